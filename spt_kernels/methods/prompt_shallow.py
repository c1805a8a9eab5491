"""Learned tokens before the patches, from the first block on (VPT-Shallow, Jia et al., 2022)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..model import backbone_numel
from .method import Method
from .prompt_places import PlainVit, drawn_prompts
from .prompted import DroppingBlock, PromptedBlock
from .tunable import Tunable, counted, freeze_backbone

DEFAULT_PROMPTS = 50  # each makes all blocks slower: 0.5 % of ViT-B/16 would be 558 of them


def tune(model: nn.Module, method: Method, plan: Any) -> Tunable:
    """Put 50 prompts before the first block, or with a budget as many as that pays for.

    They are dropped after the last block: whatever pools the tokens sees the model's own.

    Raises:
        ValueError: the model is no plain ViT, its tokens are tied to their places, or the budget
            does not pay for a prompt.
    """
    vit = PlainVit.of(model)
    if vit is None:
        raise ValueError(
            f"method: {method.name!r} puts prompts among the tokens of a plain ViT (blocks, "
            f"embed_dim, num_prefix_tokens), got a {type(model).__name__}"
        )
    vit.check_room(model, method)
    count = DEFAULT_PROMPTS
    if method.budget is not None:
        budget = method.count(backbone_numel(model, method.head))
        count = budget // vit.width
        if not count:
            raise ValueError(f"budget: a prompt costs {vit.width:,}, got {budget:,}")
    freeze_backbone(model, method.head)
    prompts, last = drawn_prompts(model, count, vit.width), len(vit.blocks) - 1
    if last:
        vit.blocks[last] = DroppingBlock(vit.blocks[last], count, vit.num_prefix)
    vit.blocks[0] = PromptedBlock(vit.blocks[0], prompts, vit.num_prefix, stay=last > 0)
    return counted(model, head=method.head)
