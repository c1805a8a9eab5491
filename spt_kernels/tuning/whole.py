"""Parameters that are trained whole, in fp32 whatever the dtype of the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import attach_whole


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
