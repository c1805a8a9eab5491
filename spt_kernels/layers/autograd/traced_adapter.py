"""An Adapter as compilers take it best: it keeps its bottleneck, and is part of what reads it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import wide_dtype, without_autocast
from .plain_backward import plain_backward
from .traced import made_again, thin_product
from .wide_product import wide_product


class FrozenBase(NamedTuple):
    """What `y`, the output of the base layer, was made of: some rows of it.

    Attributes:
        weight: `[out, in]`.
        bias: `[out]` or None.
        rows: which output features.
    """

    weight: Tensor
    bias: Tensor | None
    rows: slice


class TracedAdapter(torch.autograd.Function):
    """`Up(GELU(Down(y)))` of `y = F.linear(x, weight, bias)`, some rows of it.

    `y` is needed for nothing but the gradient of `down`, which is
    `gᵀ y = (gᵀ x) weightᵀ + (Σ g) biasᵀ` as well: thin products with an `x` that can be made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        down: Tensor,
        down_bias: Tensor,
        up: Tensor,
        up_bias: Tensor,
        base: FrozenBase,
    ) -> Tensor:
        """The update, shape and dtype those of `y`, which has the features of `base.rows` alone."""
        low = F.linear(y, down.to(y.dtype), down_bias.to(y.dtype))  # [..., rank]
        ctx.save_for_backward(x, down, up, low, base.weight, base.bias)
        ctx.rows = base.rows
        with without_autocast(low.device):
            return thin_product(F.gelu(low), up.to(low.dtype).t()) + up_bias.to(low.dtype)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `y` and of the four parameters."""
        x, down, up, low, weight, bias = ctx.saved_tensors
        dtype = grad_output.dtype
        gy, low = grad_output.flatten(0, -2), low.flatten(0, -2)
        wide = wide_dtype(gy)
        grad_up = wide_product(gy.t(), F.gelu(low))
        grad_up_bias = gy.sum(0, dtype=wide)
        g = torch.ops.aten.gelu_backward(gy @ up.to(dtype), low)  # [tokens, rank]
        total = g.sum(0, dtype=wide)
        inner = wide_product(g.t(), made_again(x.to(dtype).flatten(0, -2)))  # [rank, in]
        grad_down = inner @ weight[ctx.rows].to(wide).t()
        if bias is not None:
            grad_down = grad_down + total[:, None] * bias[ctx.rows].to(wide)
        grad_y = thin_product(g, down.to(dtype)).view(grad_output.shape)
        grads = grad_down.to(down.dtype), total.to(down.dtype), grad_up.to(up.dtype)
        return grad_y, None, *grads, grad_up_bias.to(up.dtype), None
