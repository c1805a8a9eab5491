"""The delta write against plain indexing, and the restore bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from spt_kernels import native
from spt_kernels.ops.write_delta import gather_original, write_delta
from spt_kernels.reference import write_delta as reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Case = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def make_case(shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], seed: int = 0) -> Case:
    """Weights, about half of their positions, the values there, and deltas of a like size."""
    generator = torch.Generator().manual_seed(seed)
    targets = [
        torch.randn(shape, generator=generator).to(dtypes[m % len(dtypes)])
        for m, shape in enumerate(shapes)
    ]
    indices = [
        torch.randperm(t.numel(), generator=generator)[: (t.numel() + 1) // 2].sort().values.int()
        for t in targets
    ]
    originals = [gather_original(t, i) for t, i in zip(targets, indices, strict=True)]
    deltas = [torch.randn(i.numel(), generator=generator) for i in indices]
    return targets, indices, originals, deltas


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7, 9), (1025,), (0,), (8, 3, 4, 4)], ids=str)
def test_writes_base_plus_delta_where_the_index_says(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    targets, indices, originals, deltas = make_case([shape], [dtype])
    before = targets[0].clone()

    write_delta(targets, indices, originals, deltas)

    trained = torch.zeros(before.numel(), dtype=torch.bool)
    trained[indices[0].long()] = True
    dense = torch.zeros(before.numel()).index_add_(0, indices[0].long(), deltas[0])
    expected = (before.float().view(-1) + dense).to(dtype)
    assert torch.equal(targets[0].view(-1)[trained], expected[trained])
    assert torch.equal(targets[0].view(-1)[~trained], before.view(-1)[~trained])


def test_many_targets_of_mixed_dtypes_at_once() -> None:
    shapes: list[tuple[int, ...]] = [(3, 5), (0,), (2000,), (1,), (64, 65)]
    together, alone = make_case(shapes, list(FLOATS)), make_case(shapes, list(FLOATS))
    write_delta(*together)
    for row in zip(*alone, strict=True):
        write_delta(*([part] for part in row))
    for one, other in zip(together[0], alone[0], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_restores_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    targets, indices, originals, deltas = make_case([(50, 40)], [dtype])
    # bits that a sum would not keep: a negative zero, a NaN's payload, an infinity
    targets[0].view(-1)[indices[0][:3].long()] = torch.tensor([-0.0, math.nan, math.inf]).to(dtype)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    targets[0].view(bits).view(-1)[int(indices[0][1])] += 5
    base = targets[0].clone()
    originals = [gather_original(targets[0], indices[0])]

    write_delta(targets, indices, originals, deltas)
    assert not torch.equal(targets[0].view(bits), base.view(bits))
    write_delta(targets, indices, originals, None)

    assert torch.equal(targets[0].view(bits), base.view(bits))


def test_the_sum_is_taken_in_fp32() -> None:
    # in bf16 the delta itself would round to 2^-8 and the sum to 1 + 2^-7
    target = torch.ones(1, dtype=torch.bfloat16)
    index = torch.zeros(1, dtype=torch.int32)
    write_delta([target], [index], [target.clone()], [torch.tensor([2**-8 * 0.999])])
    assert float(target) == 1.0


def test_poisoned_targets_are_written_not_read() -> None:
    targets, indices, originals, deltas = make_case([(33, 31)], [torch.float32])
    targets[0].fill_(math.nan)
    write_delta(targets, indices, originals, deltas)
    assert targets[0].view(-1)[indices[0].long()].isfinite().all()
    assert int(targets[0].isnan().sum()) == 33 * 31 - indices[0].numel()


def test_frozen_and_trained_leaves_can_be_targets() -> None:
    targets, indices, originals, deltas = make_case([(4, 4)], [torch.float32])
    weight = torch.nn.Parameter(targets[0])
    version = weight._version
    write_delta([weight], indices, originals, [torch.nn.Parameter(deltas[0])])
    assert weight._version > version
    assert weight.grad_fn is None


def test_backward_notices_a_write_after_the_forward() -> None:
    targets, indices, originals, deltas = make_case([(4, 4)], [torch.float32])
    x = torch.ones(2, 4, requires_grad=True)
    output = torch.nn.functional.linear(x, targets[0]).sum()
    write_delta(targets, indices, originals, deltas)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_same_bits_with_one_thread() -> None:
    many = make_case([(400, 500), (3,)], [torch.bfloat16])
    one = make_case([(400, 500), (3,)], [torch.bfloat16])
    threads = torch.get_num_threads()
    write_delta(*many)
    torch.set_num_threads(1)
    try:
        write_delta(*one)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(many[0][0], one[0][0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("restore", [False, True], ids=["write", "restore"])
def test_native_agrees_with_the_reference(dtype: torch.dtype, restore: bool) -> None:
    if not native.available():
        pytest.skip(native.why_unavailable())
    ours, spec = make_case([(300, 401)], [dtype]), make_case([(300, 401)], [dtype])
    for backend, case in ((native, ours), (reference, spec)):
        case[0][0].fill_(1.0)
        backend.write_delta(*case[:3], None if restore else case[3])
    assert torch.equal(ours[0][0], spec[0][0])


@pytest.mark.gpu
@pytest.mark.parametrize("restore", [False, True], ids=["write", "restore"])
def test_cuda_agrees_with_the_reference(restore: bool) -> None:
    shapes: list[tuple[int, ...]] = [(300, 401), (0,), (1,), (2048, 3)]
    spec = make_case(shapes, list(FLOATS))
    ours = [[tensor.cuda() for tensor in column] for column in spec]
    for targets in (ours[0], spec[0]):
        for target in targets:
            target.fill_(1.0)
    write_delta(*ours[:3], None if restore else ours[3])
    reference.write_delta(*spec[:3], None if restore else spec[3])
    for found, expected in zip(ours[0], spec[0], strict=True):
        assert torch.equal(found.cpu(), expected)


def test_opcheck() -> None:
    targets, indices, originals, deltas = make_case([(4, 4), (3,)], [torch.bfloat16])
    opcheck(torch.ops.spt.write_delta.default, (targets, indices, originals, deltas))
    opcheck(torch.ops.spt.write_delta.default, (targets, indices, originals, None))


def test_gather_original_reads_flat_positions() -> None:
    weight = torch.arange(12.0).view(3, 4)
    index = torch.tensor([1, 4, 11], dtype=torch.int32)
    assert gather_original(torch.nn.Parameter(weight), index).tolist() == [1.0, 4.0, 11.0]
    assert gather_original(weight, index[:0]).shape == (0,)


def test_nothing_to_write() -> None:
    write_delta([], [], [], [])
    write_delta([], [], [], None)


def test_channels_last_is_refused() -> None:
    weight = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    index = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="channels-last weight needs"):
        write_delta([weight], [index], [torch.zeros(1)], None)
    with pytest.raises(ValueError, match="target must be contiguous"):
        gather_original(weight, index)


def test_positions_beyond_int32_are_refused() -> None:
    weight = torch.empty(2**31 + 1, device="meta", dtype=torch.bfloat16)
    index = torch.zeros(1, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="at most 2147483648 elements"):
        gather_original(weight, index)


@pytest.mark.parametrize(
    ("place", "bad", "error", "message"),
    [
        (0, torch.zeros(4, dtype=torch.float64), TypeError, r"targets\[0\] must be float32"),
        (1, torch.zeros(2, dtype=torch.int64), TypeError, r"index of targets\[0\] must be"),
        (1, torch.zeros(2, 1, dtype=torch.int32), ValueError, "contiguous vector"),
        (1, torch.zeros(2, dtype=torch.int32, device="meta"), ValueError, "must be on cpu"),
        (2, torch.zeros(2, dtype=torch.float16), TypeError, "original of .* torch.float32"),
        (2, torch.zeros(3), ValueError, r"shape of its index, \(2,\), got \(3,\)"),
        (3, torch.zeros(2, dtype=torch.bfloat16), TypeError, r"deltas\[0\] must be"),
        (3, torch.zeros(4)[::2], ValueError, r"deltas\[0\] must be contiguous"),
    ],
    ids=["fp64", "int64", "2-d", "device", "original-dtype", "nnz", "delta-dtype", "strided"],
)
def test_bad_arguments_are_refused(
    place: int, bad: Tensor, error: type[Exception], message: str
) -> None:
    columns = [
        torch.zeros(4),
        torch.tensor([0, 3], dtype=torch.int32),
        torch.ones(2),
        torch.ones(2),
    ]
    columns[place] = bad
    with pytest.raises(error, match=message):
        write_delta(*([column] for column in columns))


def test_lists_of_different_lengths_are_refused() -> None:
    targets, indices, originals, deltas = make_case([(4,), (5,)], [torch.float32])
    with pytest.raises(ValueError, match="originals has 1 items, expected 2"):
        write_delta(targets, indices, originals[:1], deltas)
    with pytest.raises(ValueError, match="deltas has 0 items, expected 2"):
        write_delta(targets, indices, originals, [])
