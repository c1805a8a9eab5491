"""Unstructured tuning as it is usually written: the whole gradient of a matrix, then a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..plan import Plan
from ..sensitivity import Sensitivity
from ..tuning import replace_module
from . import spt
from .matrices import folding
from .method import Method
from .tunable import Tunable, freeze_backbone


def plan(model: nn.Module, method: Method, sensitivity: Sensitivity) -> Plan:
    """The entries that SPT without structured tuning takes."""
    return spt.plan(model, method, sensitivity)


def tune(model: nn.Module, method: Method, plan: Plan) -> Tunable:
    """Put a `MaskedLinear` in the place of every matrix of the plan."""
    return tune_entries(model, plan, MaskedLinear, "model")


def tune_entries(
    model: nn.Module, plan: Plan, layer: Callable[[nn.Linear, Tensor], nn.Module], file: str
) -> Tunable:
    """Put a layer in the place of every matrix of the plan; biases and norms are trained whole."""
    freeze_backbone(model)
    replaced: list[str] = []
    trained = 0
    for name, index in plan.unstructured.items():
        module_name, _, local = name.rpartition(".")
        module = model.get_submodule(module_name)
        if isinstance(module, nn.Linear) and local == "weight":
            replace_module(model, module_name, layer(module, index))
            replaced.append(module_name)
            trained += index.numel()
        else:
            trained += model.get_parameter(name).requires_grad_().numel()
    return Tunable(model, trained, fold=folding(replaced), file=file)


class MaskedLinear(nn.Module):
    """A trainable dense weight whose gradient is computed whole and then masked."""

    def __init__(self, linear: nn.Linear, index: Tensor) -> None:
        super().__init__()
        self.plain = [linear]  # in a list: not a child, its parameters are ours
        self.weight, self.bias = linear.weight.requires_grad_(), linear.bias
        mask = torch.zeros_like(linear.weight, dtype=torch.bool).view(-1)
        mask[index.to(mask.device)] = True
        self.mask: Tensor
        # not in the state dict, which is the plain layer's
        self.register_buffer("mask", mask.view(linear.weight.shape), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The plain layer."""
        weight: Any = _MaskedGradient.apply(self.weight, self.mask)
        return F.linear(x, weight, self.bias)

    def folded(self) -> nn.Linear:
        """The layer that was replaced; it shares the weight."""
        return self.plain[0]


class _MaskedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return grads[0] * mask, None
