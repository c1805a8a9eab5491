"""LoRA of rank K on attention's fused q, k, v, as its authors write it (Hu et al., 2021).

It is what the paper compares with, at the same count as rank K on q and v apart; `lora` is this
package's own, which keeps less for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..tuning import replace_module
from .matrices import attention_matrices, check_rank, folding
from .method import Method
from .tunable import Tunable, counted, freeze_backbone


def tune(model: nn.Module, method: Method, plan: Any) -> Tunable:
    """Put a `PlainLora` in the place of each of the layers."""
    targets = attention_matrices(model, method.head)
    check_rank("method", method.size, (linear.weight.shape for linear in targets.values()))
    freeze_backbone(model, method.head)
    for name, linear in targets.items():
        replace_module(model, name, PlainLora(linear, method.size))
    return counted(model, folding(targets), head=method.head)


class PlainLora(nn.Module):
    """`W x + B A x` as three modules under autograd."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        form: Any = {"bias": False, "dtype": torch.float32, "device": base.weight.device}
        self.down = nn.Linear(base.in_features, rank, **form)
        self.up = nn.Linear(rank, base.out_features, **form)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Base and low-rank path, the latter in its own precision."""
        y = self.base(x)
        return y + self.up(self.down(x.to(self.down.weight.dtype))).to(y.dtype)

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """The base layer with the product added."""
        self.base.weight += (self.up.weight @ self.down.weight).to(self.base.weight.dtype)
        return self.base
