"""What compilers are given to work with: values to make again, and thin products to fuse."""

from __future__ import annotations

import torch
from torch import Tensor


def made_again(tensor: Tensor) -> Tensor:
    """A tensor of the forward as a backward's product should take it; itself where none compiles.

    The partitioner of `torch.compile` keeps whatever a product of the backward reads (it calls that
    materialized in the backward and never makes it again), a LayerNorm's or GELU's output too,
    beside the input that their own backward keeps. An elementwise call in between lets it weigh
    one against the other. It must not be one that compilers remove, as a copy; the code that makes
    the tensor again takes it up.
    """
    return torch.maximum(tensor, tensor) if torch.compiler.is_compiling() else tensor


_FUSED_RANK = 16  # beyond it loads of the factors, from a cache as they are, begin to cost


def thin_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` over a rank so small that code which reads it may as well compute it.

    A product is a call of a library, whose result is written to memory and read again, as large as
    an activation. As elementwise calls it is part of what it is added to.

    Args:
        left: `[..., rank]`.
        right: `[rank, features]`, best contiguous.

    Returns:
        `[..., features]` in the dtype of `left`; sums of 16 bits are taken in fp32.
    """
    rank = left.shape[-1]
    if not torch.compiler.is_compiling() or not 0 < rank <= _FUSED_RANK:
        return left @ right
    is_half, dtype = left.element_size() == 2, left.dtype
    if is_half:
        left, right = left.float(), right.float()
    total = left[..., :1] * right[0]
    for n in range(1, rank):
        total = total + left[..., n : n + 1] * right[n]
    # torch 2.11 loses the gradients of a traced function that ends in a cast which does nothing
    return total.to(dtype) if is_half else total
