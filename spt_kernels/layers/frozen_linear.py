"""A Linear that trains nothing: under autocast it keeps no cast of its weight for the backward."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .in_place import tune_in_place
from .linear import LinearWithDeltas, frozen_linear


class FrozenLinear(LinearWithDeltas):
    """An `nn.Linear` of a tuned model that the plan leaves as it is.

    It computes what it always did, to the bit, and shows the name of its plain class. Of a plain
    one autograd keeps what autocast has made of the weight, until the backward has read it: of a
    ViT-B/16 170 MB. Here the backward makes that again.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`F.linear(input, weight, bias)`."""
        if torch.compiler.is_compiling():
            return F.linear(input, self.weight, self.bias)
        return frozen_linear(input, *self._own_parameters())


def keep_no_cast(linear: nn.Linear) -> None:
    """Give a plain Linear, whose forward is `nn.Linear`'s, that class, in place.

    One whose own class does not allow that stays as it is.
    """
    with contextlib.suppress(TypeError):
        tune_in_place(linear, FrozenLinear, lambda own: None)
