"""The autograd function of a linear layer that trains a sparse delta of its weight, no more."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .first_order import first_derivative_only
from .saved_input import SavedInput, Tensors
from .sparse_gradient import DeltaPattern, sparse_gradient
from .tuned_linear import cast, grad_of_x, without_autocast


class SparseLinear(torch.autograd.Function):
    """`TunedLinear` of a delta alone, which most layers are: every line here costs each of them.

    On a fast card a step takes as long as its host does; this has half of the lines.
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
        if not torch.compiler.is_compiling() and y._is_view():
            y = y.data  # no view any more, so that what follows may work on it in place
        recipe, kept = SavedInput.of(x, y.dtype, pattern.columns)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *kept)
        ctx.saved_input, ctx.pattern, ctx.x_dtype = recipe, pattern, x.dtype
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of the delta; never one of the whole weight."""
        weight: Tensor | None
        kept: Tensors
        weight, *kept = ctx.saved_tensors
        recipe, pattern = ctx.saved_input, ctx.pattern
        gy = grad_output.reshape(-1, grad_output.shape[-1])  # [tokens, out]
        with without_autocast(grad_output.device):
            x = recipe.rebuild(kept)
            some = recipe.kind == "columns"
            grad_delta = sparse_gradient(gy, x, pattern.compacted if some else pattern.whole)
            del x  # before the gradient of the same size is made
            if weight is None:
                return None, None, None, grad_delta, None
            flat = grad_of_x(gy, weight)  # [tokens, in]
            grad_x = cast(flat.view(*grad_output.shape[:-1], flat.shape[1]), ctx.x_dtype)
        return grad_x, None, None, grad_delta, None
