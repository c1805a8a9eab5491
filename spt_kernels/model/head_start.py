"""How large a new classifier head may start."""

from __future__ import annotations

import math

import torch
from torch import nn

from .head import HeadPatterns, head_names

# What an architecture draws is kept up to so many times the size that torch gives a Linear: timm's
# 0.02, of most of its models, is within that up to 3,200 features
_MOST = 2.0


@torch.no_grad()
def start_small(model: nn.Module, head: HeadPatterns | None = None) -> tuple[str, ...]:
    """Shrink what an architecture drew too large for a new head, in place.

    timm draws the heads of its EfficientNets and their kin for training from scratch, uniformly
    within ±1/√classes: ±0.29 for twelve. On 1,280 features that are trained already the first
    scores are then many times what a loss can use, and a short fine-tuning spends itself on
    shrinking them. torch starts a `Linear` uniformly within ±1/√features, whose root mean square
    is 1/√(3 · features): a matrix of the head that is more than twice that is scaled to it. Any
    other is left to the bit, and nothing is drawn, so that what is drawn later stays the same.

    Args:
        model: whose head was initialised and not trained.
        head: as `head_names` has it.

    Returns:
        Names of the weights that were scaled.
    """
    scaled = []
    for name in head_names(model, head):
        weight = model.get_parameter(name)
        if weight.ndim < 2 or not weight.numel():
            continue
        size = weight.square().mean().sqrt().item()
        usual = 1 / math.sqrt(3 * weight[0].numel())
        if size > _MOST * usual:
            weight.mul_(usual / size)
            scaled.append(name)
    return tuple(scaled)
