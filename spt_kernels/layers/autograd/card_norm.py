"""The autograd function of a LayerNorm on a card of which a few weights and biases are trained."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.sparse_norm_grad import launch_sparse_norm_grad
from .attach import AttachDelta
from .autocast import without_autocast
from .plain_backward import one_at_a_time, recorded_gradients

_layer_norm_backward: Any = torch.ops.aten.native_layer_norm_backward.default


class NormCall(NamedTuple):
    """What a LayerNorm computes with besides tensors that autograd is shown.

    Attributes:
        shape: that it normalizes.
        eps: that it adds to variances.
        weight_index: int32 `[n_weights]`, the trained entries of the weight; None without any.
        bias_index: int32 `[n_biases]`, the same of the bias.
    """

    shape: tuple[int, ...]
    eps: float
    weight_index: Tensor | None
    bias_index: Tensor | None


class CardLayerNorm(torch.autograd.Function):
    """`F.layer_norm`, whose backward sums over tokens for the trained entries alone.

    torch's own sums for every channel, which takes a card longer than the gradient of the input.
    """

    spt_kind = "layer_norm"  # a layer behind it makes its input of what this keeps

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        weight_delta: Tensor | None,
        bias_delta: Tensor | None,
        call: NormCall,
    ) -> Tensor:
        """The normalized input; weight and bias hold base + delta already."""
        y, mean, rstd = torch.native_layer_norm(x, call.shape, weight, bias, call.eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        # not saved: nothing reads their values, which may be others by the time of the backward
        ctx.call, ctx.deltas = call, (weight_delta, bias_delta)
        return y

    @staticmethod
    @one_at_a_time
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of both deltas."""
        if torch.is_grad_enabled():  # they are to be differentiated themselves
            grads = _differentiable(ctx, grad_output)
        else:
            with without_autocast(grad_output.device):
                grads = _gradients(ctx, grad_output)
        grad_x, of_weight, of_bias = grads
        return grad_x, None, None, of_weight, of_bias, None


def _needed(ctx: Any) -> tuple[bool, bool, bool]:
    """Of the input and of both deltas."""
    needs = ctx.needs_input_grad
    return needs[0], needs[3], needs[4]


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight, bias = ctx.saved_tensors
    call: NormCall = ctx.call
    needs_x, has_weight, has_bias = _needed(ctx)
    grad_x = None
    if needs_x:
        input_alone = [True, False, False]
        grad_x, _, _ = _layer_norm_backward(
            grad_output, x, call.shape, mean, rstd, weight, bias, input_alone
        )
    flat = mean.numel(), math.prod(call.shape)  # without tokens no size can be told from the others
    flat_gy, flat_x = grad_output.reshape(flat), x.reshape(flat)
    indices = call.weight_index, call.bias_index
    entries = launch_sparse_norm_grad(flat_gy, flat_x, mean, rstd, *indices)
    n_weights = 0 if call.weight_index is None else len(call.weight_index)
    of_weight, of_bias = entries[:n_weights], entries[n_weights:]
    return grad_x, of_weight if has_weight else None, of_bias if has_bias else None


def _differentiable(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The same by torch's own LayerNorm, of which every derivative is known."""
    x, _, _, *affine = ctx.saved_tensors
    call: NormCall = ctx.call
    indices = call.weight_index, call.bias_index
    weight, bias = (
        tensor if delta is None else AttachDelta.apply(tensor, delta, index)
        for tensor, delta, index in zip(affine, ctx.deltas, indices, strict=True)
    )
    y = F.layer_norm(x, call.shape, weight, bias, call.eps)
    return recorded_gradients(y, (x, *ctx.deltas), _needed(ctx), grad_output)
