"""LoRA of rank K on attention's fused q, k, v, as its authors write it (Hu et al., 2021).

It is what the paper compares with, at the same count as rank K on q and v apart; `lora` is this
package's own, which keeps less for the backward. A model without attention has it where
`lora_matrices` says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..tuning import replace_module
from .matrices import check_rank, folding, lora_matrices
from .method import Method
from .tunable import Tunable, counted, freeze_backbone


def tune(model: nn.Module, method: Method, plan: Any) -> Tunable:
    """Put a `PlainLora` in the place of each of the layers.

    Raises:
        ValueError: there is none, or a Linear has fewer features than K.
    """
    targets = lora_matrices(model, method.head, method.size)
    check_rank("method", method.size, (what.shape[:2] for what in targets.values()))
    freeze_backbone(model, method.head)
    for name in targets:
        base: Any = model.get_submodule(name)
        replace_module(model, name, PlainLora(base, method.size))
    return counted(model, folding(targets), head=method.head)


class PlainLora(nn.Module):
    """`W x + B A x` as three modules under autograd.

    Args:
        base: a Linear, or a 1×1 convolution of any stride, which `A` then has as well.
        rank: of the product.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.base = base
        form: Any = {"bias": False, "dtype": torch.float32, "device": base.weight.device}
        self.down: Any
        self.up: Any
        if isinstance(base, nn.Linear):
            self.down = nn.Linear(base.in_features, rank, **form)
            self.up = nn.Linear(rank, base.out_features, **form)
        else:
            stride: Any = base.stride
            self.down = nn.Conv2d(base.in_channels, rank, 1, stride, **form)
            self.up = nn.Conv2d(rank, base.out_channels, 1, **form)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Base and low-rank path, the latter in its own precision."""
        y = self.base(x)
        return y + self.up(self.down(x.to(self.down.weight.dtype))).to(y.dtype)

    @torch.no_grad()
    def folded(self) -> nn.Linear | nn.Conv2d:
        """The base layer with the product added."""
        up, down = self.up.weight.flatten(1), self.down.weight.flatten(1)
        self.base.weight += (up @ down).to(self.base.weight.dtype).view_as(self.base.weight)
        return self.base
