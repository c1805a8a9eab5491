"""The autograd function of a linear layer that trains a sparse delta of its weight, no more."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .gradient_of_delta import packed_gradient
from .plain_backward import quick_backward
from .saved_input import RebuildingFunction, SavedInput
from .sparse_gradient import DeltaPattern, eager_sparse_gradient
from .wide_product import product_in


class SparseLinear(RebuildingFunction):
    """`TunedLinear` of a delta alone, which most layers are: every line here costs each of them.

    On a fast card a step takes as long as its host does; this has half of the lines. Nothing here
    is for a compiler, which has `TunedLinear`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        delta: Tensor,
        pattern: DeltaPattern,
    ) -> Tensor:
        """`[..., out]`; the delta, which requires a gradient, is in the weight already."""
        y = F.linear(x, weight, bias)
        y = y.data  # no view, so that what follows may work on it in place
        recipe, kept = SavedInput.eager(x, y.dtype, pattern.whole.columns)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *kept)
        ctx.saved_input, ctx.how = recipe, (pattern, x.dtype)
        return y

    @staticmethod
    @quick_backward
    def backward(ctx: Any, grad_output: Tensor, is_plain: bool) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of the delta; never one of the whole weight."""
        weight, *kept = ctx.saved_tensors
        recipe: SavedInput = ctx.saved_input
        pattern, x_dtype = ctx.how
        entries = pattern.compacted if recipe.kind == "columns" else pattern.whole
        is_dense = grad_output.is_contiguous()
        grad_delta = None
        if is_plain and is_dense and grad_output.is_cpu:
            grad_delta = packed_gradient(grad_output, recipe, kept, entries)
        if grad_delta is None:
            gy = grad_output.reshape(-1, entries.out_features)  # [tokens, out]
            grad_delta = eager_sparse_gradient(gy, recipe.rebuild(kept), entries)
        if weight is None:
            return None, None, None, grad_delta, None
        if weight.dtype is not grad_output.dtype:
            weight = weight.to(grad_output.dtype)
        if is_dense and grad_output.dtype is x_dtype:
            grad_x = torch.matmul(grad_output, weight)  # of others it may make one for each row
        else:
            gy = grad_output.reshape(-1, entries.out_features)
            flat = product_in(x_dtype, gy, weight)
            grad_x = flat.view(*grad_output.shape[:-1], pattern.whole.in_features)
        return grad_x, None, None, grad_delta, None
