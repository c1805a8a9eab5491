"""The plain way: one sample forward, one sample backward, the gradient as autograd gives it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .batches import Batch
from .losses import PerSampleLoss


def sample_gradients(
    model: nn.Module,
    loss: PerSampleLoss,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    loss_scale: float,
) -> Iterator[dict[str, Tensor | None] | None]:
    """Yield, sample by sample, the gradient of its own loss by parameter; None where unused.

    Nothing is had of a sample whose loss is undefined: None in place of all gradients.
    """
    with _requiring_grad(parameters):
        for i in range(batch.size):
            sample = batch.samples(i, i + 1)
            outputs = model(sample.input)
            own = loss.of_sample(outputs, sample.target, 1, 0)
            if loss.is_undefined(own, outputs, sample.target, 1, 0):
                yield None
                continue
            if not own.requires_grad:
                yield dict.fromkeys(parameters)
                continue
            gradients = torch.autograd.grad(
                own * loss_scale, list(parameters.values()), allow_unused=True
            )
            yield {
                name: None if gradient is None else gradient / loss_scale
                for name, gradient in zip(parameters, gradients, strict=True)
            }


def add_squared_gradients(
    model: nn.Module,
    loss: PerSampleLoss,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    loss_scale: float,
    scores: Mapping[str, Tensor],
) -> int:
    """Add the squared gradient of every sample of `batch` to `scores`, which are mutated.

    Returns:
        How many samples have a loss.
    """
    n_defined = 0
    for gradients in sample_gradients(model, loss, batch, parameters, loss_scale):
        n_defined += gradients is not None
        for name, gradient in (gradients or {}).items():
            if gradient is not None:
                scores[name] += gradient.float().square_()
    return n_defined


@contextlib.contextmanager
def _requiring_grad(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
