"""An Adapter's down-projection for compilers, which need not keep what goes into it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .first_order import first_derivative_only
from .traced import made_again
from .tuned_linear import wide_dtype, without_autocast


class TracedDown(torch.autograd.Function):
    """`F.linear(y, down, down_bias)` of `y = F.linear(x, weight, bias)`, some rows of it.

    `y` is needed for nothing but the gradient of `down`, which is
    `gᵀ y = (gᵀ x) weightᵀ + (Σ g) biasᵀ` as well: thin products with an `x` that can be made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        down: Tensor,
        down_bias: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: slice,
    ) -> Tensor:
        """`[..., rank]` in the dtype of `y`, which has the features of `rows` alone."""
        ctx.save_for_backward(x, weight, bias, down)
        ctx.rows, ctx.bias_dtype = rows, down_bias.dtype
        return F.linear(y, down.to(y.dtype), down_bias.to(y.dtype))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `y`, and of both parameters in fp32."""
        x, weight, bias, down = ctx.saved_tensors
        g = grad_output.flatten(0, -2)  # [tokens, rank]
        with without_autocast(g.device):
            wide = wide_dtype(g)
            total = g.sum(0, dtype=wide)
            inner = g.t() @ made_again(x.to(g.dtype).flatten(0, -2))  # [rank, in]
            grad_down = inner.to(wide) @ weight[ctx.rows].to(wide).t()
            if bias is not None:
                grad_down = grad_down + total[:, None] * bias[ctx.rows].to(wide)
            grad_y = (g @ down.to(g.dtype)).view(*grad_output.shape[:-1], down.shape[1])
        grads = grad_y, grad_down.to(down.dtype), total.to(ctx.bias_dtype)
        return *grads, None, None, None, None
