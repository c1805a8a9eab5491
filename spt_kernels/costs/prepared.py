"""What a row of the cost table starts from: a model ready to train, and the budget of all rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..anatomy import describe, head_names
from ..parameter_info import ParameterInfo

LORA_RANK = 16  # of the rival, whose count is everybody's budget


@dataclass(frozen=True)
class Prepared:
    """A model ready to train.

    Attributes:
        model: trains what requires a gradient.
        trained: how many values change, besides the head's.
        optimizer: over all that requires a gradient.
        for_inference: makes of the trained model what a user would deploy, in place.
        file_bytes: what is handed over.
    """

    model: nn.Module
    trained: int
    optimizer: torch.optim.Optimizer
    for_inference: Callable[[nn.Module], nn.Module]
    file_bytes: Callable[[nn.Module], int]


def budget_of(model: nn.Module) -> int:
    """Parameters of a LoRA of rank 16 on the fused qkv, 0.69 % of ViT-B/16 as in the paper."""
    return sum(LORA_RANK * sum(m.weight.shape) for m in lora_targets(model).values())


def lora_targets(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers whose operation is attention's q, k, v; without attention, all in the blocks."""
    linear = block_matrices(model)
    chosen = [
        name for name, what in linear.items() if any(b.operation == "q" for b in what.row_blocks)
    ]
    modules = {name: model.get_submodule(name) for name in chosen or linear}
    return {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}


def block_matrices(model: nn.Module) -> dict[str, ParameterInfo]:
    """Module name -> what is known of its weight, for every linear layer inside a block."""
    return {
        name.removesuffix(".weight"): what
        for name, what in describe(model).items()
        if what.kind == "linear" and what.block and name.endswith(".weight")
    }


def freeze_backbone(model: nn.Module) -> None:
    """Train the head alone."""
    model.requires_grad_(False)
    for name in head_names(model):
        model.get_parameter(name).requires_grad_()


def prepared(
    model: nn.Module,
    for_inference: Callable[[nn.Module], nn.Module],
    file_bytes: Callable[[nn.Module], int],
    head_numel: int | None = None,
) -> Prepared:
    """A model that trains every parameter that requires a gradient.

    Args:
        model: `head_names` finds its head, unless `head_numel` says how much of what is trained is
            that.
    """
    if head_numel is None:
        head_numel = sum(model.get_parameter(name).numel() for name in head_names(model))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad) - head_numel
    return Prepared(model, count, adamw(model), for_inference, file_bytes)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Torch's fastest AdamW over what requires a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-3, fused=True)


def as_it_is(model: nn.Module) -> nn.Module:
    """For what cannot be folded into the plain model, or need not be."""
    return model
