"""Top-τ on CUDA, interpreted, against a brute-force ranking: by candidates and of all scores."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels import top_tau as kernels
from spt_kernels.kernels import top_tau_filter, top_tau_pieces
from spt_kernels.kernels.top_tau_pieces import Pieces
from spt_kernels.reference import top_tau as reference

from ...ops.test_top_tau import brute_force, selections

LAUNCHES = ["draw", "guess", "filter", *["histogram"] * 4, "count", "collect"]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs for a few dozen scores, so that order and ties cross their borders."""
    monkeypatch.setattr(top_tau_pieces, "CUT", top_tau_pieces.Cut(16, 2, 4, 8))
    monkeypatch.setattr(top_tau_filter, "_SAMPLES", 1024)


@pytest.fixture(params=["candidates", "all"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "all":
        monkeypatch.setattr(kernels, "keep_candidates", lambda *_: None)
    return str(request.param)


@pytest.fixture
def many_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands count as many, of which only candidates may stay."""
    monkeypatch.setattr(top_tau_pieces, "CUT", top_tau_pieces.Cut(64, 2, 4, 16))
    monkeypatch.setattr(top_tau_filter, "_SAMPLES", 4096)
    monkeypatch.setattr(top_tau_filter, "_DRAW_BLOCK", 1024)
    monkeypatch.setattr(top_tau_filter, "_FEW", 0)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched."""
    names: list[str] = []
    launch = Pieces.launch

    def record(pieces: Pieces, kernel: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__.removesuffix("_kernel"))
        with _disable_current_modes():  # who counts calls of torch means not the interpreter's
            launch(pieces, kernel, *args, **options)

    monkeypatch.setattr(Pieces, "launch", record)
    return names


def check(tensors: list[Tensor], k: int, caps: list[int] | None = None) -> None:
    reach = [tensor.numel() for tensor in tensors] if caps is None else caps
    found = kernels.top_tau(tensors, k, reach)
    expected = reference.top_tau(tensors, k, reach)
    for ours, spec in zip(found, expected, strict=True):
        assert torch.equal(ours, spec)


def normal_scores(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).square()


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(selections())
def test_is_the_shortest_prefix_of_the_ranking(
    way: str, case: tuple[list[Tensor], int, list[int] | None]
) -> None:
    tensors, k, caps = case
    reach = [tensor.numel() for tensor in tensors] if caps is None else caps
    found = kernels.top_tau(tensors, k, reach)
    assert [chosen.tolist() for chosen in found] == brute_force(tensors, k, caps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_the_shipped_sizes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    group = top_tau_pieces.CUT.tile * top_tau_pieces.CUT.grouped
    scores = [normal_scores(n, seed=n).to(dtype) for n in (group + 1, 1, 300)]
    scores[2] = (scores[2] * 4).floor() / 4  # ties with each other
    check(scores, 20_000)


ADVERSARIES = {
    "all-equal": torch.full((96,), 3.0),
    "denormal": torch.arange(1, 97, dtype=torch.int32).view(torch.float32),
    "ascending": torch.arange(1.0, 97.0),
    "descending": torch.arange(96.0, 0.0, -1.0),
    "one-above-ties": torch.ones(96).index_fill_(0, torch.tensor([77]), 2.0),
    "outlier": torch.full((96,), 1e-38).index_fill_(0, torch.tensor([8]), 3e38),
    "ones-in-minus-zeros": torch.full((96,), -0.0).index_fill_(0, torch.arange(0, 96, 3), 1.0),
    "two-values": torch.arange(96.0).remainder(3).gt(1).float() + 1,
    "blocks": torch.arange(96.0).div(40, rounding_mode="floor").remainder(2) * 5 + 0.5,
    "a-column": torch.rand(16, 6, generator=torch.Generator().manual_seed(0))
    .index_fill_(1, torch.tensor([4]), 9.0)
    .flatten(),
}


# where all scores are ranked nothing is guessed that these could mislead: some will do
OF_ALL = ("all-equal", "denormal", "ones-in-minus-zeros", "blocks")


@pytest.mark.parametrize(
    ("way", "name"),
    [("candidates", name) for name in ADVERSARIES] + [("all", name) for name in OF_ALL],
    indirect=["way"],
)
def test_adversarial_scores(way: str, name: str) -> None:
    tensors = list(ADVERSARIES[name].tensor_split([41, 42, 42]))  # of one and of none, too
    check(tensors, 7, [50, 1, 0, 3])
    check(tensors, int((ADVERSARIES[name] > 0).sum()))


def test_a_tensor_that_is_not_aligned(way: str) -> None:
    scores = normal_scores(301)
    check([scores[1:], scores[3:].bfloat16()[1:]], 60)


class Calls(TorchDispatchMode):
    """Counts the operators of torch by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_many_scores_leave_few_candidates(
    launched: list[str], many_scores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda t: reads.append(t.numel()) or tolist(t))
    tensors = [normal_scores(1500), normal_scores(500, seed=1)]
    top_tau_pieces._laid_out.cache_clear()
    expected = reference.top_tau(tensors, 12, [1500, 500])
    with Calls() as calls:
        found = kernels.top_tau(tensors, 12, [1500, 500])
    assert all(map(torch.equal, found, expected))
    assert launched == LAUNCHES
    assert len(reads) == 1, "the host waits once"
    # besides the table: what is drawn, candidates (three), totals, positions; and the state
    made = {"empty": 6, "zeros": 1, "slice": 1, "unsafe_split_with_sizes": 1}
    assert calls.names == made | {"lift_fresh": 1, "view": 1}


def test_a_kernel_is_loaded_once_for_selections_of_all_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[str] = []

    def load(kernel: Any, *args: Any, **options: Any) -> Any:
        loaded.append(kernel.fn.__name__.removesuffix("_kernel"))
        return lambda n_programs, *given: kernel[(n_programs,)](*given)

    monkeypatch.setattr(top_tau_pieces, "load", load)
    monkeypatch.setattr(top_tau_pieces, "_loaded", {})
    tensors = [normal_scores(50), normal_scores(30, seed=1), normal_scores(90, seed=2)]
    check(tensors[:2], 12)
    assert loaded == LAUNCHES
    check(tensors, 1)
    assert loaded == LAUNCHES
    monkeypatch.setattr(kernels, "keep_candidates", lambda *_: None)
    check(tensors, 16, [9, 30, 50])
    assert loaded == [*LAUNCHES, *LAUNCHES[3:]], "of all scores"


def test_a_table_is_that_of_the_tensors_that_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "keep_candidates", lambda *_: None)
    memory = normal_scores(60)
    halves = memory.view(torch.bfloat16)
    halves.abs_().nan_to_num_(0, posinf=0)
    first = [memory[:20], memory[20:]], [20, 40]
    others = {  # by what alone of them is another
        "cap": ([memory[:20], memory[20:]], [3, 40]),
        "numel": ([memory[:20], memory[20:50]], [20, 40]),
        "address": ([memory[10:30], memory[20:]], [20, 40]),
        "dtype": ([halves[:20], memory[20:]], [20, 40]),
    }
    for other in others.values():
        for tensors, caps in (first, other):
            check(tensors, 15, caps)


@pytest.mark.parametrize("scores", [torch.ones(2000), torch.full((2000,), -0.0)], ids=["ties", "0"])
def test_too_many_candidates(scores: Tensor, launched: list[str], many_scores: None) -> None:
    scores = scores.index_fill(0, torch.tensor([1999]), 4.0)
    check([scores], 1)
    assert launched == [*LAUNCHES[:-1], *LAUNCHES[3:]]


def test_too_few_candidates(
    launched: list[str], many_scores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top_tau_filter, "_DEVIATIONS", -2.0)  # as if the sample had misled
    check([normal_scores(2000)], 50)
    assert launched == [*LAUNCHES[:-1], *LAUNCHES[3:]]


def test_no_guess_where_most_would_stay(launched: list[str], many_scores: None) -> None:
    check([normal_scores(600)], 300)
    assert launched == LAUNCHES[3:]


def test_same_bits_every_run() -> None:
    scores = [torch.arange(50.0).remainder(7), torch.arange(31.0).remainder(5)]
    first, second = (kernels.top_tau(scores, 40, [50, 31]) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [math.nan, -math.inf, -1e-45])
def test_bad_scores_are_refused(way: str, value: float) -> None:
    for k in (0, 1):
        with pytest.raises(ValueError, match="finite and not negative"):
            kernels.top_tau([torch.ones(9), torch.tensor([1.0, value])], k, [9, 0])


def test_zeros_of_both_signs_are_never_selected(way: str) -> None:
    scores = [torch.tensor([0.0, -0.0, 1e-45, 2.0])]
    assert kernels.top_tau(scores, 2, [4])[0].tolist() == [2, 3]
    with pytest.raises(ValueError, match="k is 3, but only 2 positive"):
        kernels.top_tau(scores, 3, [4])


def test_nothing_to_select() -> None:
    found = kernels.top_tau([torch.empty(0), torch.zeros(3)], 0, [0, 3])
    assert [chosen.tolist() for chosen in found] == [[], []]
    assert kernels.top_tau([torch.empty(0)], 0, [0])[0].tolist() == []
    with pytest.raises(ValueError, match="k is 1, but only 0 positive"):
        kernels.top_tau([torch.empty(0)], 1, [0])
