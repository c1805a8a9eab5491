"""Which parameters are a model's head: those that come last before the loss of two samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...model import describe
from ...model.last_layers import last_parameters
from ...model.quantized import floating_parameters
from .batches import Batch, two_samples
from .losses import PerSampleLoss, requiring_grad


def last_before_loss(model: nn.Module, loss: PerSampleLoss, batch: Batch) -> tuple[str, ...] | None:
    """Name the parameters of the last layers, from one forward pass of two samples.

    Args:
        model: frozen, in the mode in which it will be measured; frozen again afterwards.
        loss: of each sample.
        batch: any samples.

    Returns:
        The names in the model's order, none where the loss reads features; None where one of the
        two samples does not count.
    """
    parts = loss.parts(model, two_samples(batch).input)
    some = two_samples(batch) if parts else batch.samples(0, 1)
    floating = floating_parameters(model)
    norms = {name for name, what in describe(model).items() if what.kind == "norm"}
    inputs = pytree.tree_map(requiring_grad, some.input)
    try:
        for parameter in floating.values():
            parameter.requires_grad_(True)
        outputs = loss.outputs(model, inputs, some.size)
        loss.learn(model, inputs, outputs)
        losses = loss.of_each(outputs, some.target, some.size)
        if losses is None:
            return None
        return last_parameters(losses[0], _tensors(outputs), _tensors(inputs), floating, norms)
    finally:
        for parameter in floating.values():
            parameter.requires_grad_(False)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
