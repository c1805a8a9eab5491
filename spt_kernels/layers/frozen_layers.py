"""Layers of a tuned model that train nothing, and keep no more than their input's gradient reads.

They compute what they always did, to the bit. Of plain ones autograd keeps more, though nothing is
ever read of it: under autocast what that has made of the weight (of a ViT-B/16 170 MB), and of a
convolution the whole input (of the frozen ones of a ConvNeXt-B a sixth of all activations).
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.launching import is_transformed
from .conv import ConvWithDeltas, frozen_conv2d
from .in_place import tune_in_place
from .linear import LinearWithDeltas, frozen_linear


class FrozenLinear(LinearWithDeltas):
    """An `nn.Linear` that the plan leaves as it is."""

    _name_prefix = "Frozen"

    def forward(self, input: Tensor) -> Tensor:
        """`F.linear(input, weight, bias)`."""
        if is_transformed():
            return self._transformed_base(input)
        if torch.compiler.is_compiling():
            return F.linear(input, self.weight, self.bias)
        return frozen_linear(input, *self._own_parameters())


class FrozenConv2d(ConvWithDeltas):
    """An `nn.Conv2d` that the plan leaves as it is."""

    _name_prefix = "Frozen"

    def forward(self, input: Tensor) -> Tensor:
        """What the plain convolution returns."""
        if is_transformed():
            return self._transformed_base(input)
        return frozen_conv2d(self, input)


def freeze_layer(layer: nn.Linear | nn.Conv2d) -> None:
    """Let a plain layer, whose forward is its base class's, keep less, in place.

    One whose own class does not allow that stays as it is.
    """
    frozen = FrozenConv2d if isinstance(layer, nn.Conv2d) else FrozenLinear
    with contextlib.suppress(TypeError):
        tune_in_place(layer, frozen, lambda own: None)
