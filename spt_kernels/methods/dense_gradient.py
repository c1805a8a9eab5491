"""Unstructured tuning as it is usually written: the whole gradient of a matrix, then a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model import head_numel
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
    return tune_entries(model, method, plan, MaskedLinear, "model")


def tune_entries(
    model: nn.Module,
    method: Method,
    plan: Plan,
    layer: Callable[[nn.Linear, Tensor], nn.Module],
    file: str,
) -> Tunable:
    """Put a layer in the place of every matrix of the plan; of the rest gradients are masked.

    Raises:
        ValueError: the plan has structured modules.
    """
    if plan.structured:
        raise ValueError("plan: has LoRA or Adapter modules, which this method does not train")
    head = method.head_with(plan)
    in_head = head_numel(model, head)
    freeze_backbone(model, head)
    replaced: list[str] = []
    for name, index in plan.unstructured.items():
        module_name, _, local = name.rpartition(".")
        module = model.get_submodule(module_name)
        if isinstance(module, nn.Linear) and local == "weight":
            replace_module(model, module_name, layer(module, index))
            replaced.append(module_name)
        else:
            parameter = model.get_parameter(name).requires_grad_()
            parameter.register_hook(mask_of(parameter, index).mul)
    return Tunable(model, plan.num_trainable, fold=folding(replaced), file=file, in_head=in_head)


def mask_of(parameter: Tensor, index: Tensor) -> Tensor:
    """True at flat positions of a parameter."""
    mask = torch.zeros_like(parameter, dtype=torch.bool).view(-1)
    mask[index.to(mask.device)] = True
    return mask.view(parameter.shape)


class MaskedLinear(nn.Module):
    """A trainable dense weight whose gradient is computed whole and then masked.

    An optimizer's weight decay, if any, moves what the mask leaves out all the same.
    """

    def __init__(self, linear: nn.Linear, index: Tensor) -> None:
        super().__init__()
        self.plain = [linear]  # in a list: not a child, its parameters are ours
        self.weight, self.bias = linear.weight.requires_grad_(), linear.bias
        self.mask: Tensor
        # not in the state dict, which is the plain layer's
        self.register_buffer("mask", mask_of(linear.weight, index), persistent=False)

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
