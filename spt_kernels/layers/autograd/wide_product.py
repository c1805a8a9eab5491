"""Products of 16 bits whose sums, which are in fp32 anyway, come out as that."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ...ops.launching import goes_as_on_card
from .autocast import cast

_FAKES_KNOW_NONE = torch.torch_version.TorchVersion(torch.__version__) < "2.11"  # 2.9's fail


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, of matrices or of two batches of them; of 16 bits in fp32."""
    if gives_fp32(left):
        if _FAKES_KNOW_NONE and isinstance(left, FakeTensor):
            return left.new_empty(*left.shape[:-1], right.shape[-1], dtype=torch.float32)
        multiply = torch.mm if left.dim() == 2 else torch.bmm
        return multiply(left, right, out_dtype=torch.float32)
    product = left @ right
    return product.float() if product.element_size() == 2 else product


def product_in(dtype: torch.dtype, left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, of matrices, in another dtype."""
    # a compiler makes the change of dtype a part of what reads the product
    if dtype is torch.float32 and not torch.compiler.is_compiling():
        return wide_product(left, right)
    return cast(torch.mm(left, right), dtype)


def gives_fp32(factor: Tensor) -> bool:
    """Whether a product of 16 bits comes in fp32 at once, as only a card gives it."""
    if torch.compiler.is_compiling():
        return factor.is_cuda and factor.element_size() == 2
    return goes_as_on_card(factor) and factor.element_size() == 2
