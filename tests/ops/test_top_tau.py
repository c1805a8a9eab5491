"""Top-τ against a brute-force ranking in numpy, ties and caps included."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from spt_kernels import native
from spt_kernels.ops.top_tau import top_tau
from spt_kernels.reference import top_tau as reference


def brute_force(tensors: list[Tensor], k: int, caps: list[int] | None) -> list[list[int]]:
    """Walk down the ranking one score at a time until the selection counts for `k`."""
    ranking = sorted(
        (-float(value), m, position)
        for m, tensor in enumerate(tensors)
        for position, value in enumerate(tensor.float().reshape(-1).tolist())
        if value > 0
    )
    selected: list[list[int]] = [[] for _ in tensors]
    for _, m, position in ranking:
        counted = sum(
            len(chosen) if caps is None else min(len(chosen), caps[i])
            for i, chosen in enumerate(selected)
        )
        if counted == k:
            break
        selected[m].append(position)
    return [sorted(chosen) for chosen in selected]


def countable(tensors: list[Tensor], caps: list[int] | None) -> int:
    counts = [int((tensor > 0).sum()) for tensor in tensors]
    return sum(counts if caps is None else map(min, counts, caps))


# few distinct values, so that most are tied; the smallest are denormal
SCORES = st.sampled_from([0.0, 1e-45, 1e-40, 2e-3, 0.5, 1.0, 1.0000001, 3e38])
LISTS = st.lists(st.lists(SCORES, max_size=12), min_size=1, max_size=5)


@st.composite
def selections(draw: st.DrawFn) -> tuple[list[Tensor], int, list[int] | None]:
    dtypes = st.sampled_from([torch.float32, torch.bfloat16])
    tensors = [torch.tensor(scores, dtype=draw(dtypes)) for scores in draw(LISTS)]
    n = len(tensors)
    caps = draw(st.none() | st.lists(st.integers(0, 13), min_size=n, max_size=n))
    return tensors, draw(st.integers(0, countable(tensors, caps))), caps


@settings(max_examples=300, deadline=None, derandomize=True)
@given(selections())
def test_is_the_shortest_prefix_of_the_ranking(
    case: tuple[list[Tensor], int, list[int] | None],
) -> None:
    tensors, k, caps = case
    expected = brute_force(tensors, k, caps)
    assert [chosen.tolist() for chosen in top_tau(tensors, k, caps)] == expected


@settings(max_examples=100, deadline=None, derandomize=True)
@given(selections())
def test_reference_is_the_shortest_prefix_too(
    case: tuple[list[Tensor], int, list[int] | None],
) -> None:
    tensors, k, caps = case
    reach = [tensor.numel() for tensor in tensors] if caps is None else caps
    found = reference.top_tau(tensors, k, reach)
    assert [chosen.tolist() for chosen in found] == brute_force(tensors, k, caps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [0, 1, 1000, 40_000])
def test_agrees_with_numpy_on_many_scores(k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(96, 200), (1,), (0,), (4097,), (33, 3, 4, 4), (20_000,)]
    tensors = [torch.randn(shape, generator=generator).square().to(dtype) for shape in shapes]

    found = top_tau(tensors, k)

    flat = torch.cat([tensor.float().reshape(-1) for tensor in tensors]).numpy()
    chosen = np.sort(np.argsort(-flat, kind="stable")[:k])
    offsets = np.cumsum([0] + [tensor.numel() for tensor in tensors])
    for m, positions in enumerate(found):
        own = chosen[(chosen >= offsets[m]) & (chosen < offsets[m + 1])] - offsets[m]
        assert positions.dtype == torch.int64
        assert np.array_equal(positions.numpy(), own)


def test_caps_stop_counting_but_not_selecting() -> None:
    tensors = [torch.tensor([9.0, 8.0, 7.0, 1.0]), torch.tensor([6.0, 0.5])]
    # the first tensor counts once; it takes four more selections to reach the 6.0 that counts again
    assert [t.tolist() for t in top_tau(tensors, 2, [1, 2])] == [[0, 1, 2], [0]]
    assert [t.tolist() for t in top_tau(tensors, 3, [1, 2])] == [[0, 1, 2, 3], [0, 1]]


def test_ties_go_to_the_earlier_tensor_and_the_lower_position() -> None:
    tensors = [torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 2.0])]
    assert [t.tolist() for t in top_tau(tensors, 3)] == [[0, 1], [1]]


def test_views_are_ranked_by_their_own_positions() -> None:
    score = torch.arange(1.0, 13.0).view(3, 4)
    assert top_tau([score.t()], 1)[0].tolist() == [11]
    assert top_tau([score.t()[:, ::2]], 2)[0].tolist() == [5, 7]
    assert top_tau([score[:, 1:3].requires_grad_()], 1)[0].tolist() == [5]


def test_scores_that_are_not_as_their_memory_or_of_a_class_of_their_own() -> None:
    negated = torch.tensor([1 - 2j]).conj().imag  # 2, in whose memory there is -2
    assert negated.is_neg()
    parameter = torch.nn.Parameter(torch.tensor([1.0, 3.0]))
    assert [p.tolist() for p in top_tau([negated, parameter], 2)] == [[0], [1]]


def test_same_result_with_one_thread() -> None:
    scores = [torch.rand(300, 700, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    scores[1] = (scores[1] * 8).floor()  # ties across whatever the threads split at
    threads = torch.get_num_threads()
    many = top_tau(scores, 250_000, [100_000, 200_000, 90_000])
    torch.set_num_threads(1)
    try:
        one = top_tau(scores, 250_000, [100_000, 200_000, 90_000])
    finally:
        torch.set_num_threads(threads)
    for first, second in zip(many, one, strict=True):
        assert torch.equal(first, second)


def test_native_agrees_with_the_reference() -> None:
    if not native.available():
        pytest.skip(native.why_unavailable())
    generator = torch.Generator().manual_seed(5)
    scores = [torch.rand(n, generator=generator).mul(50).floor() for n in (30_000, 1, 70_001, 12)]
    scores[2] = scores[2].bfloat16()
    caps = [2_000, 1, 50_000, 3]
    for k in (1, 1_999, 2_001, 20_000, 51_900):
        for ours, spec in zip(
            native.top_tau(scores, k, caps), reference.top_tau(scores, k, caps), strict=True
        ):
            assert torch.equal(ours, spec)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [0, 1, 5_000, 60_000])
def test_cuda_agrees_with_the_reference(k: int) -> None:
    generator = torch.Generator().manual_seed(6)
    scores = [torch.rand(n, generator=generator).mul(99).floor() for n in (70_001, 0, 1, 33_000)]
    scores[3] = scores[3].bfloat16()
    caps = [40_000, 0, 1, 25_000]
    found = top_tau([score.cuda() for score in scores], k, caps)
    for ours, spec in zip(found, reference.top_tau(scores, k, caps), strict=True):
        assert torch.equal(ours.cpu(), spec)
    with pytest.raises(ValueError, match=r"tensors\[1\] holds 1 NaN"):
        top_tau([scores[0].cuda(), torch.tensor([1.0, math.nan], device="cuda")], 1)


@pytest.mark.gpu
@pytest.mark.parametrize("is_capped", [False, True], ids=["plain", "capped"])
@pytest.mark.parametrize(
    "kind", ["random", "columns", "sorted", "ties", "all-equal", "one-huge", "mostly-zero", "bf16"]
)
def test_cuda_agrees_on_millions(kind: str, is_capped: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    scores = torch.randn(4_000_000, generator=generator).square() + 1e-30
    if kind == "columns":
        scores.view(-1, 500)[:, 3] += 50
    elif kind == "sorted":
        scores = scores.sort().values
    elif kind == "ties":
        scores = scores.mul(20).floor() + 1
    elif kind == "all-equal":
        scores.fill_(2.0)
    elif kind == "one-huge":
        scores[3_999_999] = 3e38
    elif kind == "mostly-zero":
        scores[torch.rand(4_000_000, generator=generator) < 0.99] = -0.0
    elif kind == "bf16":
        scores = scores.bfloat16()
    tensors = [*scores.tensor_split([7, 1_000_000, 1_000_001, 1_000_001, 2_500_000])]
    caps = [tensor.numel() // (300 if is_capped else 1) for tensor in tensors]
    for k in (1, 9_000):
        found = top_tau([tensor.cuda() for tensor in tensors], k, caps)
        for ours, spec in zip(found, top_tau(tensors, k, caps), strict=True):
            assert torch.equal(ours.cpu(), spec)


@pytest.mark.gpu
def test_cuda_launches_little_and_waits_once() -> None:
    from torch.profiler import ProfilerActivity, profile

    tensors = [torch.rand(300_000, device="cuda") for _ in range(8)]
    top_tau(tensors, 5_000)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        top_tau(tensors, 5_000)
    names = [event.name for event in found.events()]
    assert sum("_kernel" in name and "Launch" not in name for name in names) <= 12
    assert sum("DtoH" in name for name in names) == 1


@pytest.mark.gpu
def test_cuda_follows_tensors_from_call_to_call_and_stream_to_stream() -> None:
    memory = torch.rand(300_000, device="cuda")
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    for first in (100_000, 99_999):  # of which another table is made
        for stream in streams * 2:
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                memory.copy_(memory.flip(0))
                scores = [memory[:first], memory[first:]]
                found = [positions.cpu() for positions in top_tau(scores, 500)]
            expected = top_tau([score.cpu() for score in scores], 500)
            assert all(map(torch.equal, found, expected))


def test_nothing_to_select_from() -> None:
    assert top_tau([], 0) == []
    assert [t.tolist() for t in top_tau([torch.empty(0), torch.zeros(3)], 0)] == [[], []]


def test_opcheck() -> None:
    tensors = [torch.tensor([3.0, 0.0, 2.0, 2.0]), torch.tensor([2.0, 5.0], dtype=torch.bfloat16)]
    opcheck(torch.ops.spt.top_tau.default, (tensors, 3, [4, 1]))


@pytest.mark.parametrize(
    ("value", "fault"), [(math.nan, "NaN"), (math.inf, "infinite"), (-1e-30, "negative")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bad_scores_are_named(value: float, fault: str, dtype: torch.dtype) -> None:
    good, bad = torch.ones(8, dtype=dtype), torch.ones(2, 4, dtype=dtype)
    bad[1, 2] = value
    with pytest.raises(ValueError, match=rf"tensors\[1\] holds 1 {fault} .* position 6"):
        top_tau([good, bad], 3)
    with pytest.raises(ValueError, match=rf"blocks.0.qkv holds 1 {fault}"):
        top_tau([good, bad], 3, names={"norm": good, "blocks.0.qkv": bad}.keys())


def test_negative_zero_is_a_zero() -> None:
    scores = torch.tensor([-0.0, 2.0, 0.0])
    assert top_tau([scores], 1)[0].tolist() == [1]
    with pytest.raises(ValueError, match="only 1 positive"):
        top_tau([scores], 2)


def test_too_few_positive_scores() -> None:
    tensors = [torch.tensor([1.0, 0.0]), torch.tensor([2.0, 3.0, 4.0])]
    with pytest.raises(ValueError, match="k is 5, but only 4 positive scores can be counted"):
        top_tau(tensors, 5)
    with pytest.raises(ValueError, match="k is 4, but only 3 positive scores can be counted"):
        top_tau(tensors, 4, [9, 2])
    with pytest.raises(ValueError, match=f"k is {10**30}, but only 3 positive scores"):
        top_tau(tensors, 10**30, [10**30, 2])
    with pytest.raises(ValueError, match="k is 1, but tensors is empty"):
        top_tau([], 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([torch.ones(2)], -1), ValueError, "k must not be negative, got -1"),
        (([torch.ones(2)], 1.5), TypeError, "k must be an int"),
        (([torch.ones(2)], 1, [1, 2]), ValueError, "caps has 2 items, expected 1"),
        (([torch.ones(2)], 1, [-1]), ValueError, r"cap of tensors\[0\] must not be negative"),
        (([torch.ones(2, dtype=torch.float64)], 1), TypeError, "float32 or bfloat16"),
        (([torch.ones(2), [1.0]], 1), TypeError, r"tensors\[1\] must be a tensor"),
        (([torch.ones(2), torch.ones(2, device="meta")], 1), ValueError, "one device"),
    ],
    ids=["k-negative", "k-float", "caps-length", "cap-negative", "fp64", "list", "devices"],
)
def test_bad_arguments_are_refused(
    arguments: tuple[object, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        top_tau(*arguments)  # type: ignore[arg-type]
