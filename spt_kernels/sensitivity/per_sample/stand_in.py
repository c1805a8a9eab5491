"""Stand-ins for quantized weights while a model is measured: they have a shape, and gradients.

The gradient of a sample's loss with respect to the values that a quantized matrix stands for needs
the layer's input and the gradient of its output alone. So a parameter of that shape, in no memory,
takes the place of the weight, and the layer calls a function which the measurement watches like
`F.linear`; what it computes is the quantizer's own product.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from ...model.quantized import QuantizedMatrix, quantized_matrices
from ...ops.torch_internals import EnableTorchFunction


@contextlib.contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Put stand-ins in place of the quantized weights of Linears for a `with` block."""
    places = list(quantized_matrices(model))
    made: dict[int, nn.Parameter] = {}
    try:
        for _, module, matrix in places:
            zero = torch.zeros((), dtype=matrix.dtype, device=matrix.weight.device)
            own = made.setdefault(
                id(matrix.weight), nn.Parameter(zero.expand(matrix.shape), requires_grad=False)
            )
            module._parameters["weight"] = own
            module.__dict__["forward"] = functools.partial(_forward, module, matrix)
        yield
    finally:
        for _, module, matrix in places:
            module.__dict__.pop("forward", None)
            module._parameters["weight"] = matrix.weight


def quantized_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, matrix: QuantizedMatrix
) -> Tensor:
    """The product of a quantized matrix, with gradients of the weight that stands for it."""
    watched = tuple(t for t in (input, weight, bias) if t is not None)
    if has_torch_function(watched):
        result: Tensor = handle_torch_function(
            quantized_linear, watched, input, weight, bias, matrix
        )
        return result
    product: Tensor = _QuantizedLinear.apply(input, weight, bias, matrix)
    return product


def _forward(module: Any, matrix: QuantizedMatrix, input: Tensor) -> Tensor:
    return quantized_linear(input, module.weight, module.bias, matrix)


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, matrix: QuantizedMatrix
    ) -> Tensor:
        # in an observed call subclasses are told of none, and a quantized weight of its own product
        plain = None if bias is None else bias.detach()
        with EnableTorchFunction():
            y = matrix.product(x.detach(), plain)
        ctx.matrix, ctx.x_dtype = matrix, x.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        (x,) = ctx.saved_tensors
        gy = grad_output.reshape(-1, grad_output.shape[-1])
        grad_x = grad_weight = grad_bias = None
        with torch.autocast(gy.device.type, enabled=False):
            if needs_weight:
                grad_weight = gy.t() @ x.reshape(-1, x.shape[-1]).to(gy.dtype)
            if needs_bias:
                grad_bias = gy.sum(0)
            if needs_x:
                flat = gy @ ctx.matrix.dense(gy.dtype)
                grad_x = flat.view(*grad_output.shape[:-1], -1).to(ctx.x_dtype)
        return grad_x, grad_weight, grad_bias, None
