"""Unstructured tuning by the layer that was published with SPT, written anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..plan import Plan
from .dense_gradient import plan, tune_entries
from .method import Method
from .tunable import Tunable

__all__ = ["DiagonalLinear", "plan", "tune"]


def tune(model: nn.Module, method: Method, plan: Plan) -> Tunable:
    """Put a `DiagonalLinear` in the place of every matrix of the plan."""
    return tune_entries(model, method, plan, DiagonalLinear, "trained")


class DiagonalLinear(nn.Module):
    """A clone of the weight per forward, a diagonal per backward.

    The gradient of nnz values is the diagonal of the nnz × nnz product of the gathered rows of the
    output's gradient and the gathered columns of the input.
    """

    def __init__(self, linear: nn.Linear, index: Tensor) -> None:
        super().__init__()
        self.plain = [linear]
        self.weight, self.bias = linear.weight, linear.bias
        self.index: Tensor
        self.register_buffer("index", index.to(linear.weight.device))
        values = torch.zeros(index.numel(), dtype=torch.float32, device=linear.weight.device)
        self.delta = nn.Parameter(values)

    def forward(self, x: Tensor) -> Tensor:
        """Clone the weight, add the values, multiply."""
        y: Any = _DiagonalGradient.apply(x, self.weight, self.bias, self.delta, self.index)
        return y

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """The layer that was replaced, the values added to its weight."""
        self.weight.view(-1).index_add_(0, self.index, self.delta.to(self.weight.dtype))
        return self.plain[0]


class _DiagonalGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, index: Tensor
    ) -> Tensor:
        whole = weight.clone()
        whole.view(-1).index_add_(0, index, delta.to(whole.dtype))
        ctx.save_for_backward(x, whole, index)
        return F.linear(x, whole.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, whole, index = ctx.saved_tensors
        gy = grads[0].flatten(0, -2)  # [tokens, out]
        rows, columns = index // whole.shape[1], index % whole.shape[1]
        inputs = x.flatten(0, -2)[:, columns].to(gy.dtype)  # under autocast x may be wider
        product = gy[:, rows].t() @ inputs  # [nnz, nnz]
        grad_x = grads[0] @ whole.to(grads[0].dtype)
        grad_bias = gy.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, product.diagonal().float(), None
