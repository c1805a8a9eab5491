"""Sensitivities for weighing costs where no photographs are at hand."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..model import HeadPatterns, backbone_numel, candidate_names, describe, head_names
from .scores import Sensitivity

# Standard deviations of log sensitivity as measured on a small pre-trained ViT and photographs of
# CIFAR-10 (800 samples, 24 matrices): of a matrix's mean, of the means of its rows and of its
# columns, and of what is left in an entry.
MATRIX, ROW, COLUMN, ENTRY = 1.8, 0.9, 0.85, 0.35


def skewed_sensitivity(model: nn.Module, *, head: HeadPatterns | None = None) -> Sensitivity:
    """Scores that concentrate in matrices, rows and columns as strongly as measured ones do.

    The head is as `head_names` has it: by name, unless it is given.
    """
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    info = describe(model)
    scores = {}
    for name in candidate_names(model, head=head):
        shape = parameters[name].shape
        log_score = ENTRY * torch.randn(shape, generator=generator)
        log_score += MATRIX * torch.randn((), generator=generator)
        for axis, deviation in zip(range(len(shape)), (ROW, COLUMN), strict=False):
            sizes = [1] * len(shape)
            sizes[axis] = shape[axis]
            log_score += deviation * torch.randn(sizes, generator=generator)
        scores[name] = log_score.exp()
    made = Sensitivity.from_tensors(
        scores,
        num_samples=1,
        info={name: info[name] for name in scores},
        head=head_names(model, head),
        backbone_numel=backbone_numel(model, head),
    )
    return made if head is not None else replace(made, head_source="names")
