"""The dense way to a weight gradient asks torch for a product in fp32 of factors in 16 bits."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels import sparse_weight_grad


def test_torch_widens_a_product_as_the_dense_way_asks_it_to() -> None:
    # on a card alone: here the call is traced without one
    with FakeTensorMode():
        left = torch.empty(8, 16, dtype=torch.bfloat16, device="cuda")
        right = torch.empty(8, 4, dtype=torch.bfloat16, device="cuda")
        product = sparse_weight_grad._product(left.T, right)
        assert (product.dtype, product.shape) == (torch.float32, (16, 4))
