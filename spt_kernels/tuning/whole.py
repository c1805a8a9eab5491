"""Parameters that are trained whole, in fp32 whatever the dtype of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.sharded import is_sharded
from ..layers import attach_whole
from ..layers.deltas.late_optimizer import mark_cast, mark_frozen
from ..ops.dtypes import FLOATS_OF_16_BITS

_EXACT = "_spt_exact_heads"  # of a tuned model: the values that heads were loaded with


def is_coarse(parameter: Tensor) -> bool:
    """Whether a parameter has 16 bits, which most steps of an optimizer are too small for."""
    return parameter.dtype in FLOATS_OF_16_BITS


def train_whole(model: nn.Module, name: str) -> None:
    """Train all of one parameter of a tuned model: itself, or its values in fp32 if it has 16 bits.

    Args:
        model: tuned, or about to be.
        name: of the parameter in the base model, any of them.
    """
    parameter = model.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]]
    assert parameter is not None
    owners = [
        (module, local)
        for module in model.modules()
        for local, own in module._parameters.items()
        if own is parameter
    ]
    values: nn.Parameter | None = None
    for module, local in owners if is_coarse(parameter) else []:
        if attach_whole(module, local, values):
            values = module._parameters[f"{local}_fp32"]
    if values is None:
        parameter.requires_grad_(True)


def train_cast_heads(model: nn.Module) -> None:
    """Train heads in fp32 that were cast to 16 bits after `apply`, which has found them in 32.

    Args:
        model: tuned, or around one that is.
    """
    for part in model.modules():
        for name, parameter in _heads(part):
            if is_coarse(parameter):
                _train_cast(part, name, parameter)
        vars(part).pop(_EXACT, None)


def take_cast_heads(model: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Have a state dict with or without such heads' values in fp32 fit a tuned model.

    A head in fp32 takes these values; a model that is cast only once it is loaded, as Lightning
    does it, then trains them to the bit. A head whose values are trained in fp32 takes those in 16
    bits where there are no others, as version 0.9 has saved them.
    """
    trained = dict(model.named_parameters())
    for name in _head_names(model):
        whole, key = f"{name}_fp32", f"{prefix}{name}"
        if whole in trained and f"{key}_fp32" not in state_dict and key in state_dict:
            state_dict[f"{key}_fp32"] = state_dict[key].float()
    for name, parameter in _heads(model):
        values = state_dict.get(f"{prefix}{name}_fp32")
        if values is None or values.shape != parameter.shape:
            continue
        if is_coarse(parameter):
            _train_cast(model, name, parameter)
        else:
            state_dict[prefix + name] = state_dict.pop(f"{prefix}{name}_fp32")
            vars(model).setdefault(_EXACT, {})[name] = values.detach().clone()


def _head_names(model: nn.Module) -> tuple[str, ...]:
    tuning: Any = getattr(model, "spt_tuning", None)
    return () if tuning is None else tuple(tuning.plan.head)


def _heads(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name -> the head's parameters of a tuned model, unless their values in fp32 are trained."""
    names = _head_names(model)
    named = [(n, p) for n, p in model.named_parameters() if n in names] if names else []
    return [(name, own) for name, own in named if own.requires_grad and not is_sharded(own)]


@torch.no_grad()
def _train_cast(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    exact = vars(model).get(_EXACT, {}).get(name)
    train_whole(model, name)
    mark_frozen([parameter], model)
    mark_cast(parameter, name)
    if exact is not None and torch.equal(exact.to(parameter), parameter):
        model.get_parameter(f"{name}_fp32").copy_(exact)
