"""Learned tokens before the patches of every block (VPT-Deep, Jia et al., 2022).

In a Swin they are in every window of the block's attention, as there.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..model import backbone_numel
from .method import Method
from .prompt_places import drawn_prompts, prompt_places
from .tunable import Tunable, counted, freeze_backbone


def tune(model: nn.Module, method: Method, plan: Any) -> Tunable:
    """Give every block as many prompts as the budget pays for.

    Raises:
        ValueError: the model is no plain ViT and no Swin, or the budget does not pay for one in
            each block.
    """
    places = prompt_places(model, method)
    one_each = sum(place.width for place in places)
    budget = method.count(backbone_numel(model, method.head))
    if budget < one_each:
        raise ValueError(f"budget: one prompt in each block costs {one_each:,}, got {budget:,}")
    freeze_backbone(model, method.head)
    for place in places:
        place.put(drawn_prompts(model, budget // one_each, place.width))
    return counted(model, head=method.head)
