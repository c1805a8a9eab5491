"""The autograd function of a linear layer that trains a LoRA, no more, on a card."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.dtypes import FLOATS
from ...ops.launching import is_plain, may_launch, on_card
from ...ops.low_rank_ways import (
    NO_NORM,
    covers_all,
    dropped_of,
    kernels_of_a_card,
    nothing_dropped,
    serves,
)
from ...ops.torch_internals import count_dispatch_modes
from .autocast import is_any_autocast_on
from .lora_call import LoraCall
from .lora_launches import grad_of_b, source_of
from .low_rank_linear import gradients_of
from .plain_backward import plain_backward
from .saved_input import RebuildingFunction, SavedInput
from .wide_product import wide_product


class CardLowRankLinear(RebuildingFunction):
    """`LowRankLinear` of plain tensors, which launches the kernels itself: see `SparseLinear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        lora: LoraCall,
        dtype: torch.dtype,
    ) -> Tensor:
        """`[..., out]` in `dtype`, which `dtype_on_card` gave."""
        kernels, _ = kernels_of_a_card()
        low = x if x.dtype is dtype else x.to(dtype)
        (group,) = lora.groups
        span = group.span
        # one that autocast would cast is added as it is, by the update
        late = bias is not None and bias.dtype is not dtype and covers_all(span, bias.shape[0])
        y = F.linear(low, weight, None if late else bias).contiguous()
        with on_card(x.device):
            all_of_x = 1, lora_a.shape[1], 0, 0
            nothing = nothing_dropped()
            dropped = dropped_of(lora.dropout, lora.seed) if lora.dropout else nothing
            inner = kernels.low_rank_down(
                low, lora_a, all_of_x, lora.kept_scale, dropped, is_across=True
            )
            kernels.low_rank_up(
                y, y, inner, lora_b, span, lora.scale, nothing, bias if late else None
            )
        y = y.data  # no view, so that what follows may work on it in place
        recipe, kept_tensors = SavedInput.eager(x, dtype)
        ctx.save_for_backward(
            lora_a, lora_b, weight if ctx.needs_input_grad[0] else None, inner, *kept_tensors
        )
        ctx.saved_input, ctx.how = recipe, (lora, dropped, x.dtype)
        return y

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of both factors."""
        lora_a, lora_b, weight, inner, *kept = ctx.saved_tensors
        lora, dropped, x_dtype = ctx.how
        saved: SavedInput = ctx.saved_input
        dtype = inner.dtype
        if grad_output.dtype is not dtype or not may_launch(grad_output):
            tensors = grad_output, weight, lora_a, lora_b
            return *gradients_of(*tensors, lora, inner, saved, kept, x_dtype), None
        *shape, out_features = grad_output.shape
        gy = grad_output.reshape(-1, out_features)  # [tokens, out]
        if not gy.is_contiguous():
            gy = gy.contiguous()
        kernels, grads = kernels_of_a_card()
        (group,) = lora.groups
        with on_card(gy.device):
            scale = lora.scale * lora.kept_scale
            grad_inner = kernels.low_rank_down(gy, lora_b, group.span, scale, nothing_dropped())
            source = source_of(saved)
            if source is not None and is_plain(source[0]):
                grad_a = grads.low_rank_grad(source[0], grad_inner, dropped, *source[1:])
            else:
                flat = saved.rebuild(kept).reshape(-1, lora_a.shape[1])
                if lora.dropout:
                    as_it_is = "none", NO_NORM
                    grad_a = grads.low_rank_grad(flat, grad_inner, dropped, *as_it_is)
                else:
                    grad_a = wide_product(grad_inner.t(), flat)
                del flat  # before the gradient of the same size is made
            grad_b = grad_of_b(lora, gy, inner)
            if weight is None:
                return None, None, None, grad_a, grad_b, None, None
            grad = torch.mm(gy, weight if weight.dtype is dtype else weight.to(dtype))
            grad_x = grad if x_dtype is dtype else torch.empty_like(grad, dtype=x_dtype)
            span = 1, lora_a.shape[1], 0, 0
            kernels.low_rank_up(
                grad, grad_x, grad_inner, lora_a, span, 1.0, dropped, is_across=True
            )
        return grad_x.view(*shape, lora_a.shape[1]), None, None, grad_a, grad_b, None, None


def dtype_on_card(
    lora: LoraCall, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor
) -> torch.dtype | None:
    """In which `CardLowRankLinear` computes with these; None where it is not for them.

    Whoever asks knows that no transform is at work, and nothing compiled.
    """
    dtype = x.dtype
    if is_any_autocast_on() and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda") if dtype is not torch.float64 else dtype
    elif weight.dtype is not dtype:
        return None
    is_fit = (
        len(lora.groups) == 1
        and lora.dropout < 1.0
        and serves(dtype, lora_a.shape[0])
        and x.dtype in FLOATS
        and x.numel() > 0
        and lora_a.is_contiguous()
        and lora_b.is_contiguous()
        and type(lora_a) is type(lora_b) is type(weight) is torch.nn.Parameter
        and type(x) is Tensor
        and (x.is_cuda or x.is_cpu)
        and not x.is_neg()
        and count_dispatch_modes() == 0
    )
    return dtype if is_fit else None
