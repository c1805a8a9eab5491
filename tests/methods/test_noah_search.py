"""NOAH's search finds a planted optimum within its limit, and goes on where it was stopped."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from spt_kernels.methods import Method
from spt_kernels.methods.noah_architecture import KINDS, NoahArchitecture
from spt_kernels.methods.noah_search import search
from spt_kernels.methods.noah_space import NoahSpace

SPACE = NoahSpace(depth=2, width=24, qkv=72)


def every_architecture() -> list[NoahArchitecture]:
    sizes = (1, 5, 10)
    kinds = [*((size, 0) for size in sizes), *itertools.product(sizes, sizes)]
    return [NoahArchitecture(*chosen) for chosen in itertools.product(kinds, repeat=3)]


def planted(architecture: NoahArchitecture) -> float:
    """What each size of each module is worth, so that more is not always better."""
    total = 0.0
    for place, size in enumerate(itertools.chain(*architecture.by_block)):
        total += Random(f"{place} {size}").random()
    return total


@pytest.mark.parametrize("limit", [600, 1500, 10_000])
def test_the_best_within_the_limit_is_found(limit: int) -> None:
    seen: list[NoahArchitecture] = []

    def score(architecture: NoahArchitecture) -> float:
        seen.append(architecture)
        return planted(architecture)

    found = search(SPACE, score, limit)
    within = [a for a in every_architecture() if SPACE.count(a) <= limit]
    assert found.best == max(within, key=planted)
    assert found.score == planted(found.best)
    assert len(seen) == len(set(seen)), "each is asked for once"
    assert set(seen) == set(found.scores) <= set(within)
    assert len(seen) <= 50 * 16
    if limit == 1500:
        assert len(seen) < len(within), "not by looking at them all"


def test_the_same_seed_finds_the_same_in_the_same_order() -> None:
    first, again, other = (
        list(search(SPACE, planted, 900, generations=2, population=8, seed=seed).scores)
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(first) == 24


def test_a_search_that_is_stopped_goes_on_from_its_scores() -> None:
    options: dict[str, Any] = {"generations": 3, "population": 8}
    whole = search(SPACE, planted, 900, **options)
    kept: dict[NoahArchitecture, float] = {}
    asked: list[NoahArchitecture] = []

    def score(architecture: NoahArchitecture) -> float:
        if len(asked) == 20:
            raise KeyboardInterrupt
        asked.append(architecture)
        return planted(architecture)

    with pytest.raises(KeyboardInterrupt):
        search(
            SPACE, score, 900, **options, on_generation=lambda _, found: kept.update(found.scores)
        )
    assert len(kept) == 16
    asked.clear()
    resumed = search(SPACE, score, 900, **options, known=kept)
    assert resumed == whole
    assert list(resumed.scores) == list(whole.scores)
    assert len(asked) == len(whole.scores) - 16


def test_of_the_best_the_one_that_trains_least_is_found() -> None:
    found = search(SPACE, lambda _: 0.5, 900, generations=4, population=20)
    least = min(SPACE.count(a) for a in found.scores)
    assert SPACE.count(found.best) == least


def test_a_space_with_a_single_architecture_is_searched_in_no_time() -> None:
    told: list[int] = []
    found = search(
        SPACE, planted, 193, on_generation=lambda number, _: told.append(number), generations=2
    )
    assert list(found.scores) == [SPACE.smallest]
    assert told == [0, 1, 2]


def test_what_is_drawn_keeps_within_the_limit_and_to_the_space() -> None:
    space = NoahSpace(depth=12, width=768, qkv=2304)
    assert space.depths == (3, 6, 9, 12)
    assert space.count(space.smallest) == 3 * (768 + (2 * 768 + 1 + 768) + 4 * 768) == 18_435
    for limit in (18_435, 20_000, 100_000, 640_000):
        random = Random(limit)
        for _ in range(20):
            drawn = space.sample(random, limit)
            assert space.count(drawn) <= limit
            for kind in KINDS:
                sizes = getattr(drawn, kind)
                depth = sum(size > 0 for size in sizes)
                assert depth in space.depths
                assert set(sizes[:depth]) <= {1, 5, 10}
                assert set(sizes[depth:]) <= {0}
    with pytest.raises(ValueError, match=r"smallest architecture .* trains 18,435, got 18,434"):
        space.sample(Random(0), 18_434)
    assert [NoahSpace(d, 8, 24).depths for d in (1, 2, 5)] == [(1,), (1, 2), (2, 3, 4, 5)]


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ValueError, match="score: expected a finite number, got nan"):
        search(SPACE, lambda _: float("nan"), 900)
    with pytest.raises(ValueError, match=r"budget: .* trains 193, got 192"):
        search(SPACE, planted, 192)
    with pytest.raises(ValueError, match="generations, population: expected 0 or more"):
        search(SPACE, planted, 900, generations=-1)


def test_an_architecture_survives_json(tmp_path: Path) -> None:
    made = NoahArchitecture((1, 0), (2, 0), (0, 3))
    file = tmp_path / "architecture.json"
    file.write_text(json.dumps({**made.to_json(), "val_accuracy": 0.5}))
    assert NoahArchitecture.load(file) == made
    method = Method("noah", architecture=json.loads(file.read_text()))
    assert method.architecture == made
    assert not method.is_searched
    assert Method("noah").is_searched
    with pytest.raises(ValueError, match="architecture: no such file"):
        NoahArchitecture.load(tmp_path / "none.json")
    file.write_text('{"prompts": [1]}')
    with pytest.raises(ValueError, match=r"architecture\.json: architecture: .* adapters, loras"):
        NoahArchitecture.load(file)


@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        (((1,), (1,), (1, 2)), ValueError, "expected as many of each, .* 1 adapters, 2 loras"),
        (((1,), (-1,), (1,)), ValueError, "adapters: expected 0 or more, got -1"),
        (((0,), (0,), (0,)), ValueError, "expected a module in one block at least, got none"),
        (((), (), ()), ValueError, "expected a module in one block at least"),
        (((1.0,), (1,), (1,)), TypeError, r"prompts: expected a whole number per block"),
        (((True,), (1,), (1,)), TypeError, "prompts: expected a whole number per block"),
        ((3, (1,), (1,)), TypeError, "prompts: expected a whole number per block, got 3"),
    ],
)
def test_an_impossible_architecture_is_refused(sizes: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=f"architecture: {words}"):
        NoahArchitecture(*sizes)


@pytest.mark.parametrize("option", ["supernet_epochs", "generations", "population"])
def test_options_of_the_search_are_checked(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}: expected more than zero, got 0"):
        Method("noah", **{option: 0})
    with pytest.raises(ValueError, match=f"{option}: method 'lora' has none"):
        Method("lora", **{option: 7})
    with pytest.raises(TypeError, match=f"{option}: expected a whole number"):
        Method("noah", **{option: 1.5})
