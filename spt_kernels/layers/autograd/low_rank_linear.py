"""The autograd function of a linear layer that trains a LoRA, no more."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .lora_call import LoraCall
from .plain_backward import plain_backward
from .saved_input import RebuildingFunction, SavedInput
from .tuned_linear import linear_with_lora


class LowRankLinear(RebuildingFunction):
    """`TunedLinear` of a LoRA alone, whose two factors are both trained: see `SparseLinear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        lora: LoraCall,
    ) -> Tensor:
        """`[..., out]`, in the dtype that autocast, if it is on, gives to `F.linear`."""
        y, inner = linear_with_lora(x, weight, bias, lora_a, lora_b, lora)
        if y._is_view():
            y = y.data  # no view any more, so that what follows may work on it in place
        recipe, kept = SavedInput.eager(x, y.dtype)
        ctx.save_for_backward(
            lora_a, lora_b, inner, weight if ctx.needs_input_grad[0] else None, *kept
        )
        ctx.saved_input, ctx.how = recipe, (lora, x.dtype)
        return y

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of both factors."""
        lora_a, lora_b, inner, weight, *kept = ctx.saved_tensors
        recipe: SavedInput = ctx.saved_input
        lora, x_dtype = ctx.how
        gy = grad_output.reshape(-1, grad_output.shape[-1])  # [tokens, out]
        grad_b = lora.grad_of_b(gy, inner)
        grad_inner = lora.grad_of_inner(gy, lora_b)
        x = recipe.rebuild(kept)
        grad_a = lora.grad_of_a(grad_inner, x, may_write=recipe.kind != "tensor")
        shape = x.shape
        del x  # before the gradient of the same size is made
        if weight is None:
            return None, None, None, grad_a, grad_b, None
        if weight.dtype is not gy.dtype:
            weight = weight.to(gy.dtype)
        grad_x = lora.grad_of_x(gy, weight, grad_inner, lora_a).view(shape)
        if grad_x.dtype is not x_dtype:
            grad_x = grad_x.to(x_dtype)
        return grad_x, None, None, grad_a, grad_b, None
