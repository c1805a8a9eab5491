"""NOAH's evolutionary search: the architecture with the best score within a limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType

from .noah_architecture import NoahArchitecture
from .noah_space import NoahSpace

_TRIES = 10  # for each child that is wanted


@dataclass(frozen=True)
class Found:
    """What a search has found so far.

    Attributes:
        best: the architecture with the highest score; of several such the one that trains least,
            among these the first.
        score: its score.
        scores: of every architecture that was looked at, in the order of looking.
    """

    best: NoahArchitecture
    score: float
    scores: Mapping[NoahArchitecture, float]


def search(
    space: NoahSpace,
    score: Callable[[NoahArchitecture], float],
    limit: int,
    *,
    generations: int = 15,
    population: int = 50,
    seed: int = 0,
    known: Mapping[NoahArchitecture, float] = MappingProxyType({}),
    on_scored: Callable[[], object] = lambda: None,
    on_generation: Callable[[int, Found], object] = lambda *_: None,
) -> Found:
    """Search by evolution (Zhang et al., 2022; the algorithm is Guo et al.'s single-path one-shot).

    The first generation is drawn. Each that follows has as many again, none of which was looked at
    before: up to one half mutants of the best fifth of all so far, up to one half crosses of two of
    these, and drawn ones where these are too few. In a small space a generation may come short.

    Args:
        space: what to search among.
        score: of an architecture, the higher the better; asked once for each.
        limit: the most parameters that an architecture may have.
        generations: after the first.
        population: architectures of a generation.
        seed: of all that is drawn: the same scores lead to the same result.
        known: scores of an earlier search with the same arguments, which are not asked for again.
            What that was stopped in goes on so.
        on_scored: called after each architecture.
        on_generation: called after each generation, the first as 0, with what is found so far.

    Raises:
        ValueError: no architecture is within the limit, a score is not finite, or there is to be no
            generation.
    """
    if generations < 0 or population < 1:
        raise ValueError(
            "generations, population: expected 0 or more and 1 or more, "
            f"got {generations} and {population}"
        )
    space.check_limit(limit)
    random = Random(seed)
    scores: dict[NoahArchitecture, float] = {}
    ranked: list[NoahArchitecture] = []
    for generation in range(generations + 1):
        for architecture in _generation(space, ranked, limit, population, random):
            value = known.get(architecture)
            scores[architecture] = score(architecture) if value is None else value
            if not math.isfinite(scores[architecture]):
                raise ValueError(f"score: expected a finite number, got {scores[architecture]}")
            on_scored()
        ranked = sorted(scores, key=lambda a: (-scores[a], space.count(a)))
        found = Found(ranked[0], scores[ranked[0]], MappingProxyType(dict(scores)))
        on_generation(generation, found)
    return found


def _generation(
    space: NoahSpace,
    ranked: list[NoahArchitecture],
    limit: int,
    population: int,
    random: Random,
) -> list[NoahArchitecture]:
    """Architectures that are not among the `ranked`, which are all those before them."""
    parents = ranked[: max(2, population // 5)]

    def mutant() -> NoahArchitecture | None:
        child = space.mutated(random.choice(parents), random)
        return child if space.count(child) <= limit else None

    def cross() -> NoahArchitecture | None:
        child = space.crossed(random.choice(parents), random.choice(parents), random)
        return child if space.count(child) <= limit else None

    young: list[NoahArchitecture] = []
    if ranked:
        young += _new(mutant, population // 2, {*ranked})
        young += _new(cross, population - population // 2, {*ranked, *young})
    drawn = _new(lambda: space.sample(random, limit), population - len(young), {*ranked, *young})
    return [*young, *drawn]


def _new(
    draw: Callable[[], NoahArchitecture | None], count: int, taken: set[NoahArchitecture]
) -> list[NoahArchitecture]:
    """Up to `count` that are not among those taken, and no two the same."""
    new: list[NoahArchitecture] = []
    for _ in range(_TRIES * count):
        drawn = draw()
        if drawn is not None and drawn not in taken:
            taken.add(drawn)
            new.append(drawn)
            if len(new) == count:
                break
    return new
