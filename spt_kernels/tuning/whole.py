"""Parameters that are trained whole, in fp32 whatever the dtype of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed.sharded import is_sharded
from ..layers import attach_whole
from ..layers.deltas.late_optimizer import mark_frozen


def is_coarse(parameter: Tensor) -> bool:
    """Whether a parameter has 16 bits, which most steps of an optimizer are too small for."""
    return parameter.dtype in (torch.bfloat16, torch.float16)


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

    Raises:
        RuntimeError: a process group shares the model already, and would not know of the values in
            fp32; nothing is changed then.
    """
    tuned: list[tuple[nn.Module, Any]] = [
        (m, m.spt_tuning) for m in model.modules() if getattr(m, "spt_tuning", None)
    ]
    cast = [
        (part, name, parameter)
        for part, tuning in tuned
        for name, parameter in part.named_parameters()
        if name in tuning.plan.head and parameter.requires_grad and is_coarse(parameter)
        if not is_sharded(parameter)
    ]
    if cast and any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        raise RuntimeError(
            f"{cast[0][1]} was cast to {str(cast[0][2].dtype).removeprefix('torch.')} after "
            "spt.apply, and would be trained in that: cast the model before apply, or call "
            "param_groups before DistributedDataParallel"
        )
    for part, name, parameter in cast:
        train_whole(part, name)
        mark_frozen([parameter], part)
