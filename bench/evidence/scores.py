"""Scores that are not the paper's, to choose by in its place: what its authors' code measures,
chance, and the size of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_kernels import Sensitivity

BATCH = 32  # images of a batch in the published code


def other_scores(
    kind: str,
    measured: Sensitivity,
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    seed: int,
) -> Sensitivity:
    """`measured` with other scores in place of its own, for the same candidates.

    Args:
        kind: `"batch-squared"`, `"random"` or `"magnitude"`.
        measured: per-sample sensitivities of the model.
        model: plain, in evaluation mode.
        batches: images and labels in batches of `BATCH`; as many as were measured are read.
        seed: of chance.
    """
    names = list(measured)
    if kind == "batch-squared":
        scores = batch_squared(model, names, batches, measured.num_samples)
    elif kind == "random":
        dice = torch.Generator().manual_seed(seed)
        # never zero, which nothing selects
        scores = {n: 1 - torch.rand(measured[n].shape, generator=dice) for n in names}
    elif kind == "magnitude":
        scores = {n: model.get_parameter(n).detach().float().abs() for n in names}
    else:
        raise ValueError(f"kind: expected batch-squared, random or magnitude, got {kind!r}")
    return replace(measured, scores=scores, fallback=())


def batch_squared(
    model: nn.Module,
    names: list[str],
    batches: Iterable[tuple[Tensor, Tensor]],
    num_samples: int,
) -> dict[str, Tensor]:
    """Σ over batches of the square of the gradient of the *mean* loss of a batch."""
    parameters = [model.get_parameter(name) for name in names]
    scores = [torch.zeros_like(p) for p in parameters]
    left = num_samples
    for images, labels in batches:
        images, labels = images[:left], labels[:left]
        loss = F.cross_entropy(model(images), labels)
        for score, grad in zip(scores, torch.autograd.grad(loss, parameters), strict=True):
            score += grad.square()
        left -= len(labels)
        if left == 0:
            return dict(zip(names, scores, strict=True))
    raise ValueError(f"batches: expected {num_samples} samples, got {num_samples - left}")
