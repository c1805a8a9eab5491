"""LayerNorms whose backward goes by their output, kept in 16 bits, instead of their fp32 input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layers.autograd.plain_backward import plain_backward
from ..layers.norm import affine_of
from ..ops.launching import is_transformed, may_launch
from ..ops.rebuild_input import launch_layer_norm, rebuild_layer_norm
from .stand_in import StandIn


class LayerNormFromOutput(torch.autograd.Function):
    """`F.layer_norm`, exact, that keeps what it makes before weight and bias in place of its input.

    The normalized x̂ = (x - mean) / std has mean 0 and variance 1 in each row, so that no element is
    beyond the square root of their number: fp16 holds it with a relative error of 2⁻¹¹. With it,

        grad_x = (g - mean(g) - x̂ · mean(g · x̂)) / std,  g = grad_y · weight,

    reads neither x nor its mean. What a norm's output tells of its backward is the idea of Yang et
    al. (ICML 2024), who merge weight and bias into the layer behind. Here both stay where they are,
    and so do the model's weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        """`F.layer_norm(x, shape, weight, bias, eps)`."""
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        normalize = launch_layer_norm if may_launch(x) else rebuild_layer_norm
        normalized = normalize(x, mean, rstd, None, None, len(shape), torch.float16)
        ctx.save_for_backward(normalized, rstd, weight, bias)
        ctx.shape, ctx.spt_rebuild_output = shape, _rebuild_output
        return y

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, the weight and the bias."""
        normalized, rstd, weight, bias = ctx.saved_tensors
        needs_x, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        # x̂ is its own normalized form: with mean 0 and std 1 torch's kernel does the rest
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            *(grad_output, normalized.to(grad_output.dtype), ctx.shape),
            *(torch.zeros_like(rstd), torch.ones_like(rstd), weight, bias),
            [needs_x, needs_weight, needs_bias],
        )
        if needs_x:
            grad_x.mul_(rstd)
        return grad_x, None, grad_weight, grad_bias, None


def _rebuild_output(node: Any, dtype: torch.dtype) -> Tensor:
    """What the norm gave, for a layer behind that did not keep it and may write into this."""
    normalized, _, weight, bias = node.saved_tensors
    if weight is None:
        return normalized.to(dtype, copy=True)  # type: ignore[no-any-return]
    y = normalized * weight if bias is None else torch.addcmul(bias, normalized, weight)
    return y.to(dtype)  # type: ignore[no-any-return]


class ApproximateLayerNorm(StandIn):
    """Stands in for the forward of a LayerNorm, tuned or not."""

    def __call__(self, input: Tensor) -> Tensor:
        """What the module gives, whatever is kept for the backward."""
        module: Any = self.module
        is_kept = torch.is_grad_enabled() and input.requires_grad and not is_transformed()
        # of 16 bits the input takes no more than the output would
        if not is_kept or input.dtype != torch.float32 or getattr(module, "_fast_norm", False):
            return self.plain(input)  # type: ignore[no-any-return]
        weight, bias = affine_of(module)
        if weight is not None and weight.dtype != torch.float32:
            return self.plain(input)  # type: ignore[no-any-return]
        y: Tensor = LayerNormFromOutput.apply(
            input, module.normalized_shape, weight, bias, module.eps
        )
        return y
