"""The dropout op: every backend's mask is that of plain Python integers, and a fair one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from spt_kernels import native
from spt_kernels.ops.dropout import dropout, dropout_, key_of
from spt_kernels.reference import dropout as reference

UINT32 = 2**32 - 1
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def mix(x: int, between: int = 0) -> int:
    x = ((x ^ x >> 16) * 0x7FEB352D) & UINT32
    x = ((x ^ x >> 15 ^ between) * 0x846CA68B) & UINT32
    return x ^ x >> 16


def by_definition(n: int, probability: float, seed: int, first: int = 0) -> Tensor:
    low, high = seed & UINT32, seed >> 32
    before, between = mix(low ^ mix(high ^ 0x9E3779B9)), mix(high ^ mix(low ^ 0x85EBCA6B))
    threshold = round(probability * 2**32)
    return torch.tensor(
        [mix((i & UINT32) ^ before, between) >= threshold for i in range(first, first + n)],
        dtype=torch.bool,
    )


def mask(n: int, probability: float, seed: int, first: int = 0) -> Tensor:
    return dropout(torch.ones(n), probability, seed, first) != 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 7), (2, 5, 33)], ids=str)
@pytest.mark.parametrize("first", [0, 2**32 - 8])
def test_is_the_definition(shape: tuple[int, ...], dtype: torch.dtype, first: int) -> None:
    x = (1 + torch.rand(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    kept = by_definition(x.numel(), 0.3, 2**61 + 12345, first).view(shape)
    expected = torch.where(kept, x, 0)
    found = dropout(x, 0.3, 2**61 + 12345, first)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert dropout_(x, 0.3, 2**61 + 12345, first) is x
    assert torch.equal(x, expected)


@pytest.mark.skipif(not native.available(), reason=native.why_unavailable())
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("code_path", ["portable", "avx2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_code_of_many_pieces_is_the_reference(
    dtype: torch.dtype, code_path: str, threads: int
) -> None:
    x = torch.ones(200_001, dtype=dtype)
    expected, found = torch.empty_like(x), torch.empty_like(x)
    key = (0xDEADBEEF, 0x12345678, 0x40000000, 2**32 - 100_000)
    reference.dropout(x, expected, *key)
    before = torch.get_num_threads()
    native.limit_instruction_set(code_path)
    torch.set_num_threads(threads)
    try:
        native.dropout(x, found, *key)
    finally:
        torch.set_num_threads(before)
        native.limit_instruction_set(native.INSTRUCTION_SETS[-1])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9, 1e-3])
@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1])
def test_the_rate_is_right(probability: float, seed: int) -> None:
    n = 1_000_000
    rate = float((~mask(n, probability, seed)).double().mean())
    assert abs(rate - probability) < 5 * math.sqrt(probability * (1 - probability) / n)


def test_no_pattern_in_rows_columns_and_neighbours() -> None:
    """Sums over rows, columns and pairs at any distance vary as those of independent draws do."""
    dropped = (~mask(768 * 768, 0.1, 5)).double().view(768, 768) - 0.1
    unit = math.sqrt(0.1 * 0.9)
    for axis in (0, 1):
        sums = dropped.sum(axis) / (unit * math.sqrt(768))
        assert abs(float(sums.var()) - 1) < 0.25  # five standard deviations
    flat = dropped.flatten() / unit
    for distance in [*range(1, 40), 64, 256, 768, 1024, 2**16, 2**18]:
        correlation = float((flat[distance:] * flat[:-distance]).sum())
        assert abs(correlation) < 5 * math.sqrt(len(flat) - distance)


def test_masks_of_two_seeds_have_nothing_in_common() -> None:
    n, unit = 2**18, math.sqrt(0.1 * 0.9)
    seeds = [0, 1, 2, 3, 2**32, 2**33, 2**61, 2**61 + 1]
    masks = [((~mask(n, 0.1, seed)).double() - 0.1) / unit for seed in seeds]
    for one, other in itertools.combinations(masks, 2):
        assert abs(float((one * other).sum())) < 5 * math.sqrt(n)
        # nor is one the other with elements exchanged in the manner of `position ^ constant`
        blocks = [m.view(-1, 256).sum(1) for m in (one, other)]
        for flip in (1, 2, 7, 512, 1023):
            moved = blocks[1][torch.arange(n // 256) ^ flip]
            assert abs(float((blocks[0] * moved).sum())) < 6 * 256 * math.sqrt(n / 256)


def test_parts_make_up_the_whole() -> None:
    x = torch.rand(10, 100) + 1
    parts = [dropout(x[i : i + 3], 0.4, 9, first=100 * i) for i in range(0, 10, 3)]
    assert torch.equal(torch.cat(parts), dropout(x, 0.4, 9))


@pytest.mark.parametrize("seed", [0, 77, 2**61 + 12345])
def test_a_key_in_memory_is_its_seed(seed: int) -> None:
    x = torch.rand(3, 50) + 1
    words = key_of(seed)
    assert tuple(word.item() for word in key_of(torch.tensor(seed))) == words
    key = torch.tensor(words)
    assert torch.equal(dropout(x, 0.4, key, 7), dropout(x, 0.4, seed, 7))
    expected = dropout(x, 0.4, seed)
    assert torch.equal(dropout_(x, 0.4, key), expected)
    torch.library.opcheck(torch.ops.spt.dropout.default, (x, 0.4, 0, 5, key))


def test_extremes_strides_and_versions() -> None:
    x = torch.full((4, 5), float("nan"))
    assert torch.equal(dropout(x, 1.0, 3), torch.zeros(4, 5))
    assert bool(dropout(x, 0.0, 3).isnan().all())
    view = torch.rand(5, 4).t()
    assert torch.equal(dropout(view, 0.5, 3), dropout(view.contiguous(), 0.5, 3))
    with pytest.raises(ValueError, match="contiguous"):
        dropout_(view, 0.5, 3)
    version = x._version
    dropout_(x, 0.5, 3)
    assert x._version > version


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(3)
    with pytest.raises(TypeError, match=r"input must be floating, got torch\.int64"):
        dropout(x.long(), 0.5, 0)
    with pytest.raises(ValueError, match=r"probability must be within \[0, 1\], got 1.5"):
        dropout(x, 1.5, 0)
    with pytest.raises(ValueError, match="seed must be within"):
        dropout(x, 0.5, -1)
    with pytest.raises(ValueError, match=r"seed must be a number or int64 \[2\] on cpu, got torch"):
        dropout(x, 0.5, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="first must not be negative"):
        dropout(x, 0.5, 0, -1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_card_gives_the_same_mask(dtype: torch.dtype) -> None:
    x = torch.rand(1000, 33).to(dtype)
    expected = dropout(x, 0.2, 77, 5)
    for seed in (77, torch.tensor(key_of(77)).cuda()):
        assert torch.equal(dropout(x.cuda(), 0.2, seed, 5).cpu(), expected)
