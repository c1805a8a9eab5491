"""Sensitivities for benches on models whose photographs are not at hand."""

from __future__ import annotations

import torch
from torch import nn

import spt_kernels as spt
from spt_kernels.anatomy import candidate_names, describe


def skewed_sensitivity(model: nn.Module) -> spt.Sensitivity:
    """Scores that differ between matrices, rows and columns, as measured ones do."""
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    info = describe(model)
    scores = {}
    for name in candidate_names(model):
        shape = parameters[name].shape
        score = torch.rand(shape, generator=generator).square()
        for axis in range(len(shape)):
            sizes = [1] * len(shape)
            sizes[axis] = shape[axis]
            score *= torch.randn(sizes, generator=generator).exp()
        scores[name] = score
    return spt.Sensitivity.from_tensors(
        scores, num_samples=1, info={name: info[name] for name in scores}
    )
