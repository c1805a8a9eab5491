"""Learned tokens before the patches of every block (VPT-Deep, Jia et al., 2022)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..model import backbone_numel
from .method import Method
from .prompted import PlainVit, PromptedBlock
from .tunable import Tunable, counted, freeze_backbone


def tune(model: nn.Module, method: Method, plan: Any) -> Tunable:
    """Give every block as many prompts as the budget pays for.

    Raises:
        ValueError: the model is no plain ViT, or the budget does not pay for one in each block.
    """
    vit = PlainVit.of(model, method)
    one_each = len(vit.blocks) * vit.width
    budget = method.count(backbone_numel(model, method.head))
    if budget < one_each:
        raise ValueError(f"budget: one prompt in each block costs {one_each:,}, got {budget:,}")
    freeze_backbone(model, method.head)
    for number, block in enumerate(vit.blocks):
        prompts = vit.prompts(budget // one_each)
        vit.blocks[number] = PromptedBlock(block, prompts, vit.num_prefix)
    return counted(model, head=method.head)
