"""The kernel of `write_delta`, interpreted, against plain indexing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels import write_delta as kernels

from ...ops.test_write_delta import FLOATS, make_case

# one entry, a block less one, a block, a block and one, none, all dtypes in one launch
SHAPES: list[tuple[int, ...]] = [(1,), (31, 2), (32, 2), (65, 2), (0,), (7, 9, 2), (6, 50)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", 32)


def assert_written(found: Tensor, expected: Tensor) -> None:
    """Equal, but that the interpreter cuts bf16 off where the hardware rounds to nearest."""
    one_place = 2**-7 if expected.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(found, expected, rtol=one_place, atol=0)


@pytest.mark.parametrize("shapes", [SHAPES[:1], SHAPES], ids=["one", "many"])
@pytest.mark.parametrize("dtype", [*FLOATS, None], ids=str)
def test_write(shapes: list[tuple[int, ...]], dtype: torch.dtype | None) -> None:
    targets, indices, originals, deltas = make_case(shapes, [dtype] if dtype else list(FLOATS))
    expected = [target.clone() for target in targets]
    for m, target in enumerate(expected):
        target.view(-1)[indices[m].long()] = (originals[m].float() + deltas[m]).to(target.dtype)

    kernels.write_delta(targets, indices, originals, deltas)

    for found, target in zip(targets, expected, strict=True):
        assert_written(found, target)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_restore_keeps_every_bit(dtype: torch.dtype) -> None:
    targets, indices, originals, _ = make_case([(40, 5), (0,), (3,)], [dtype])
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    for original in originals:
        original[:3] = torch.tensor([-0.0, math.nan, math.inf])[: original.numel()].to(dtype)
        original[1:2].view(bits).add_(5)  # another NaN than the usual one
    expected = [target.clone() for target in targets]
    for m, target in enumerate(expected):
        target.view(-1)[indices[m].long()] = originals[m]

    kernels.write_delta(targets, indices, originals, None)

    for found, target in zip(targets, expected, strict=True):
        assert torch.equal(found.view(bits), target.view(bits))


def test_at_the_shipped_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = make_case([(2 * kernels._BLOCK + 1,), (5,)], [torch.bfloat16])
    targets, indices, originals, deltas = case
    kernels.write_delta(*case)
    for m, target in enumerate(targets):
        assert_written(target[indices[m].long()], (originals[m].float() + deltas[m]).bfloat16())


def test_nothing_to_write() -> None:
    kernels.write_delta([], [], [], [])
    kernels.write_delta(*make_case([(0,)], [torch.float32]))
