"""Stochastic rounding: the documented random bits, used without bias, in every backend alike."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spt_kernels import native
from spt_kernels.ops.sparse_adamw import sparse_adamw
from spt_kernels.reference import sparse_adamw as reference

from .test_sparse_adamw import FLOATS, HYPER, PARTS, make_entry


def lowbias32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


@pytest.mark.parametrize(("seed", "step", "entry_id"), [(0, 1, 0), (2**32 - 1, 12345, 7)])
def test_random_bits_are_the_documented_hash(seed: int, step: int, entry_id: int) -> None:
    # in Python's own integers
    stream = lowbias32((seed ^ step * 0x9E3779B9) % 2**32) ^ entry_id * 0x85EBCA6B % 2**32
    expected = [lowbias32(stream ^ k) for k in range(50)]
    assert reference.random_bits(50, seed, step, entry_id, torch.device("cpu")).tolist() == expected


def rounded(value: float, dtype: torch.dtype, n: int = 20_000, seed: int = 0) -> Tensor:
    """`value` written `n` times through the op with stochastic rounding."""
    entry = replace(
        make_entry(n, None),
        param=torch.full((n,), value),
        lr=0.0,
        target=torch.zeros(n, dtype=dtype),
        index=torch.arange(n, dtype=torch.int32),
        original=torch.zeros(n, dtype=dtype),
    )
    sparse_adamw([entry], stochastic_rounding=True, seed=seed)
    assert entry.target is not None
    return entry.target


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [1.0009765625 * 1.3, -0.2, 1e-3, 3.0001, -1000.1])
def test_rounding_is_unbiased_between_the_two_neighbours(value: float, dtype: torch.dtype) -> None:
    exact = float(torch.tensor(value))
    nearest = torch.tensor(value).to(dtype)
    other_way = torch.tensor(math.copysign(math.inf, exact - float(nearest)))
    neighbours = torch.stack([nearest, torch.nextafter(nearest, other_way.to(dtype))])
    low, high = sorted(neighbours.double().tolist())

    found = rounded(value, dtype).double()

    assert set(found.unique().tolist()) <= {low, high}
    share = (exact - low) / (high - low)  # of those that should be rounded up
    # five standard deviations of a mean of 20,000 coin flips
    slack = 5 * math.sqrt(max(share * (1 - share), 1e-4) / found.numel())
    assert abs(float((found == high).double().mean()) - share) <= slack


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -0.25, math.inf, -math.inf, math.nan, 1e-6])
def test_what_is_not_rounded_at_random(value: float, dtype: torch.dtype) -> None:
    if value == 1e-6 and dtype == torch.bfloat16:
        pytest.skip("an ordinary number in bfloat16")
    expected = torch.tensor(value).to(dtype)  # exact values, specials, fp16's subnormals
    found = rounded(value, dtype, n=256)
    torch.testing.assert_close(found, expected.expand(256), rtol=0, atol=0, equal_nan=True)


def test_fp16_overflows_as_rounding_to_nearest_does() -> None:
    assert set(rounded(65510.0, torch.float16, n=256).tolist()) == {65504.0}
    assert set(rounded(65520.0, torch.float16, n=256).tolist()) == {math.inf}


def test_streams_differ_by_seed_step_and_entry() -> None:
    device = torch.device("cpu")
    streams = [
        reference.random_bits(64, seed, step, entry_id, device)
        for seed, step, entry_id in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]
    ]
    assert len({tuple(stream.tolist()) for stream in streams}) == 4
    assert not torch.equal(rounded(0.3, torch.bfloat16), rounded(0.3, torch.bfloat16, seed=1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_native_rounds_with_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    if not native.available():
        pytest.skip(native.why_unavailable())
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(4001, generator=generator) * torch.logspace(-44, 38, 4001)
    values[:10] = torch.tensor(
        [math.inf, -math.inf, math.nan, 65510.0, -65519.0, 65503.9, 6.1035e-5, 6.1e-5, 3.4e38, 0.0]
    )
    found = []
    for backend in (native, reference):
        entry = make_entry(4001, dtype)
        entry.param.copy_(values)
        entry.original.zero_()  # type: ignore[union-attr]
        row = [0.0, *list(HYPER.values())[1:], 12, 0.0, 41.0]  # lr = 0 leaves the values alone
        columns = ([getattr(entry, part)] for part in PARTS)
        backend.sparse_adamw(*columns, torch.tensor([row]).double(), True, 2**32 - 3)
        found.append(entry.target)
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
