"""`Matrix`: a parameter of a block that is streamed, and what autocast and a delta make of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..layers import SparseDelta, plain_class
from ..layers.deltas.delta_holder import DeltaHolder

# Layers whose weight autocast casts at every call, and nothing else reads
_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Matrix(NamedTuple):
    """A parameter of a block that is streamed.

    Attributes:
        name: in the model.
        owner: the module that has it.
        local: its name there.
        parameter: itself.
    """

    name: str
    owner: nn.Module
    local: str
    parameter: nn.Parameter

    @property
    def is_cast(self) -> bool:
        """Whether autocast casts it wherever it is used; to be asked while it has its own dtype."""
        kind, is_weight = plain_class(self.owner), self.local == "weight"
        return is_weight and self.parameter.dtype == torch.float32 and kind in _CAST

    @property
    def delta(self) -> SparseDelta | None:
        """Its sparse delta, if it has one."""
        if not isinstance(self.owner, DeltaHolder):
            return None
        return self.owner.sparse_deltas().get(self.local)
