"""Thin products as elementwise calls: against plain ones of the same numbers in fp64."""

from __future__ import annotations

import pytest
import torch

from spt_kernels.layers.autograd import traced
from spt_kernels.layers.autograd.traced import thin_product

from ..tolerance import assert_within_budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [1, 8, 16])
def test_a_thin_product_of_elementwise_calls(
    rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(2, 5, rank, generator=generator).to(dtype)
    right = torch.randn(7, rank, generator=generator).to(dtype).t()
    plain = thin_product(left, right)  # torch's, as nothing compiles
    assert torch.equal(plain, left @ right)
    monkeypatch.setattr(traced.torch.compiler, "is_compiling", lambda: True)
    made = thin_product(left, right)
    assert made.dtype == dtype
    assert_within_budget(made, plain, left.double() @ right.double())


@pytest.mark.parametrize("rank", [0, 17])
def test_other_ranks_are_products(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced.torch.compiler, "is_compiling", lambda: True)
    left, right = torch.ones(3, rank), torch.ones(rank, 2)
    assert torch.equal(thin_product(left, right), torch.full((3, 2), float(rank)))
