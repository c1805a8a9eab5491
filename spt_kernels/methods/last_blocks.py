"""The last K blocks and what comes after them (Partial-K of VPT, Jia et al., 2022).

The final norm is trained too, as in VPT's code: of ViT-B/16 that is 7,089,408 values for K = 1,
8.26 % of the backbone, 8.3 % in the paper.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..model import describe
from .matrices import blocks_of
from .method import Method
from .tunable import Tunable, as_it_is, counted, freeze_backbone


def tune(model: nn.Module, method: Method, plan: Any) -> Tunable:
    """Train every floating parameter from the first of the last K blocks on.

    Order is that of the model's modules; what lies between two of the blocks (the downsampling of a
    Swin or ConvNeXt) is trained with them.

    Raises:
        ValueError: the model has fewer blocks.
    """
    blocks = blocks_of(model)
    if method.size > len(blocks):
        raise ValueError(
            f"method: {type(model).__name__} has {len(blocks)} blocks, got {method.name!r}"
        )
    info = describe(model)
    names = list(info)
    first = next(
        place for place, name in enumerate(names) if info[name].block == blocks[-method.size]
    )
    freeze_backbone(model, method.head)
    for name in names[first:]:
        parameter = model.get_parameter(name)
        parameter.requires_grad_(parameter.is_floating_point())
    return counted(model, as_it_is, head=method.head)
