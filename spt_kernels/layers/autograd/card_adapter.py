"""The autograd function of an Adapter on a card, whose products are those of a low-rank update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.low_rank_ways import covers_all, launch_down, launch_up
from . import lora_launches
from .autocast import without_autocast
from .lora_terms import LoraTerms
from .plain_backward import one_at_a_time, recorded_gradients
from .row_ranges import RangeGroup
from .wide_product import wide_product

_gelu_backward: Any = torch.ops.aten.gelu_backward.default


class CardAdapter(torch.autograd.Function):
    """`y + Up(GELU(Down(y)))` of each range of `y`, in two passes over activations, and five back.

    A library's products take one for every change of dtype, bias, range and sum besides.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        down: Tensor,
        down_bias: Tensor,
        up: Tensor,
        up_bias: Tensor,
        group: RangeGroup,
        plainly: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """A new `[..., out]`.

        Args:
            ctx: of autograd.
            y: the base layer's output, `[..., out]`.
            down: `[rank, out]`.
            down_bias: `[ranges · rank]`.
            up: `[out, rank]`.
            up_bias: `[out]`.
            group: the ranges, which are all of the output.
            plainly: computes the same by torch's calls, of which every derivative is known.
        """
        flat = y.reshape(-1, y.shape[-1])
        inner = launch_down(flat, down.t(), group.span, 1.0, 0.0, 0).add_(down_bias)
        hidden = F.gelu(inner)
        whole = up.detach()  # a Parameter would go through the dispatcher
        out = launch_up(flat, hidden, whole, group.span, 1.0, 0.0, 0, y.dtype, up_bias)
        ctx.save_for_backward(y, inner, down, down_bias, up, up_bias)
        ctx.how = group, plainly
        return out.view(y.shape).data  # no view, so that what follows may work on it in place

    @staticmethod
    @one_at_a_time
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the base layer's output and of all parameters."""
        if torch.is_grad_enabled():  # they are to be differentiated themselves
            return *_differentiable(ctx, grad_output), None, None
        with without_autocast(grad_output.device):
            return *_gradients(ctx, grad_output), None, None


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    y, inner, down, _, up, _ = ctx.saved_tensors
    group: RangeGroup = ctx.how[0]
    terms = LoraTerms((group,), 1.0, only=group if group.n_ranges == 1 else None)
    needs_y, needs_down, _, needs_up, needs_up_bias = ctx.needs_input_grad[:5]
    grad_y = grad_down = grad_up = grad_up_bias = None
    gy, flat = (tensor.reshape(-1, y.shape[-1]) for tensor in (grad_output, y))
    if needs_up:
        grad_up = lora_launches.grad_of_b(terms, gy, F.gelu(inner))
    if needs_up_bias:
        grad_up_bias = gy.sum(0, dtype=torch.float32)
    grad_inner = _gelu_backward(lora_launches.grad_of_inner(terms, gy, up), inner)
    if needs_down:
        parts = wide_product(group.of_bottleneck(grad_inner).mT, group.of_outputs(flat))
        grad_down = parts.transpose(0, 1).reshape(down.shape)  # from [ranges, rank, width]
    if needs_y:
        grad_y = launch_up(gy, grad_inner, down.t(), group.span, 1.0, 0.0, 0, y.dtype).view_as(y)
    grad_down_bias = grad_inner.sum(0, dtype=torch.float32)
    return grad_y, grad_down, grad_down_bias, grad_up, grad_up_bias


def _differentiable(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    y, _, *parameters = ctx.saved_tensors
    _, plainly = ctx.how
    return recorded_gradients(plainly(y), (y, *parameters), ctx.needs_input_grad[:5], grad_output)


def is_on_card(y: Tensor, groups: tuple[RangeGroup, ...], rank: int) -> bool:
    """Whether `CardAdapter` is for such an output, and an Adapter on these ranges."""
    return (
        len(groups) == 1
        and covers_all(groups[0].span, y.shape[-1])
        and y.numel() > 0
        and lora_launches.are_for(y, rank)
    )
