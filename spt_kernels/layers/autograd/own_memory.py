"""`own_memory`: an output that may be written into, though somebody may keep what he saw made."""

from __future__ import annotations

from torch import Tensor

from ...ops.torch_internals import CachedMode, CachingMode, count_dispatch_modes, dispatch_modes


def own_memory(y: Tensor) -> Tensor:
    """`y`; a copy of it where selective checkpointing keeps the outputs of products themselves."""
    if count_dispatch_modes() and any(map(_keeps, dispatch_modes())):
        return y.clone()
    return y


def _keeps(mode: object) -> bool:
    return isinstance(mode, (CachingMode, CachedMode))
