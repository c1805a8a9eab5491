"""C++ delta write against indexed assignment in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spt_kernels import native

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


def random_write(numel: int, nnz: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    target = torch.randn(numel, generator=random).to(dtype)  # [numel]
    index = torch.randperm(numel, generator=random)[:nnz].sort().values.int()  # [nnz]
    # of all magnitudes, so that sums round up, down, to subnormals and beyond the largest fp16
    delta = torch.randn(nnz, generator=random) * 10 ** (torch.rand(nnz, generator=random) * 16 - 9)
    return target, index, target[index.long()], delta


@DTYPES
@pytest.mark.parametrize(("numel", "nnz"), [(1, 1), (100, 0), (100, 100), (300_000, 70_000)])
def test_write_and_restore(numel: int, nnz: int, dtype: torch.dtype) -> None:
    target, index, original, delta = random_write(numel, nnz, dtype)
    base = target.clone()
    expected = target.clone()
    expected[index.long()] = (original.float() + delta).to(dtype)

    native.write_delta([target], [index], [original], [delta])
    assert torch.equal(target, expected)
    native.write_delta([target], [index], [original], None)
    assert torch.equal(target.view(torch.uint8), base.view(torch.uint8))


@DTYPES
def test_every_16_bit_pattern_is_restored(dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        patterns = torch.arange(-(2**31), 2**31 - 2**16, 65_521).int()
    else:
        patterns = torch.arange(-(2**15), 2**15).short()
    original = patterns.view(dtype)
    target = torch.zeros_like(original)
    index = torch.arange(len(original), dtype=torch.int32)
    native.write_delta([target], [index], [original], None)
    assert torch.equal(target.view(patterns.dtype), patterns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_reading_and_rounding_match_torch(dtype: torch.dtype) -> None:
    # every 16-bit number, its neighbours and the ties between them, reached from 0 and from itself
    numbers = torch.arange(-(2**15), 2**15).short().view(dtype)
    numbers = numbers[numbers.isfinite()]
    wide = numbers.float()
    halfway = wide + (wide.sort().values.diff(append=torch.tensor([0.0])).abs() / 2)
    delta = torch.cat([wide, halfway, wide * (1 + 2**-12), wide * 3, wide / 1024])
    for original in (torch.zeros(len(delta), dtype=dtype), numbers.repeat(5)):
        target = torch.zeros(len(delta), dtype=dtype)
        index = torch.arange(len(delta), dtype=torch.int32)
        native.write_delta([target], [index], [original], [delta])
        assert torch.equal(target, (original.float() + delta).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_nan_and_infinity_stay(dtype: torch.dtype) -> None:
    delta = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3.4e38])
    target = torch.zeros(5, dtype=dtype)
    index = torch.arange(5, dtype=torch.int32)
    native.write_delta([target], [index], [torch.zeros(5, dtype=dtype)], [delta])
    assert torch.equal(target.isnan(), delta.isnan())
    assert torch.equal(target[1:], delta[1:].to(dtype))


@DTYPES
@pytest.mark.parametrize("n_threads", [1, 3])
def test_many_tensors(restored_threads: None, dtype: torch.dtype, n_threads: int) -> None:
    torch.set_num_threads(n_threads)
    rows = [random_write(1000 + m, 10 * m, dtype, m) for m in range(30)]
    expected = [t.index_put((i.long(),), (o.float() + d).to(dtype)) for t, i, o, d in rows]
    targets, indices, originals, deltas = (list(column) for column in zip(*rows, strict=True))
    native.write_delta(targets, indices, originals, deltas)
    for target, value in zip(targets, expected, strict=True):
        assert torch.equal(target, value)


@pytest.mark.parametrize("position", [-1, 100, 2**31 - 1, -(2**31)])
def test_a_position_out_of_range_writes_nothing(position: int) -> None:
    good = random_write(100, 10, torch.float32)
    target, index, original, _ = random_write(100, 10, torch.float32, 1)
    index[4] = position
    before = [good[0].clone(), target.clone()]
    with pytest.raises(
        ValueError, match=rf"indices\[1\]: expected positions in 0\.\.99.*{position}"
    ):
        native.write_delta([good[0], target], [good[1], index], [good[2], original], None)
    assert torch.equal(good[0], before[0])
    assert torch.equal(target, before[1])


def test_layout_and_dtype_are_checked() -> None:
    target, index, original, delta = random_write(16, 4, torch.float32)
    with pytest.raises(ValueError, match=r"indices\[0\] must be .* torch\.int32"):
        native.write_delta([target], [index.long()], [original], [delta])
    with pytest.raises(ValueError, match=r"originals\[0\] must be .* torch\.float32"):
        native.write_delta([target], [index], [original.half()], [delta])
    with pytest.raises(ValueError, match=r"deltas\[0\] must have 4 elements, got 3"):
        native.write_delta([target], [index], [original], [delta[:3]])
    with pytest.raises(ValueError, match=r"targets\[0\] must be a contiguous CPU tensor"):
        native.write_delta([target.view(4, 4).T], [index], [original], [delta])
