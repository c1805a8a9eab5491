"""`Replay`: the second call of a region, for what it saves."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from ..layers.autograd.recording import Recording, unpack
from ..ops.torch_internals import pop_hooks, push_hooks
from .packed import Geometry, Kept, Slot, alone


class Replay(Recording):
    """A call of a module that is made for what it saves alone, and ends once that is all there.

    Args:
        name: of the region, for messages.
        module: to call.
        slots: to fill, by what is saved; None is kept already.
        notes: what layers chose in the forward.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        slots: list[weakref.ref[Slot] | None],
        notes: list[Any],
    ) -> None:
        self.module = module
        self._name, self._slots, self._notes = name, slots, iter(notes)
        self._n_saved = 0

    def run(self, args: Any, kwargs: Any) -> None:
        """Call the module; errors are those of `Frame.compute_again`."""
        push_hooks(self.pack, unpack)
        try:
            self.module(*args, **kwargs)
        except _AllThere:
            return
        finally:
            pop_hooks()
        raise RuntimeError(_differs(self._name))

    def pack(self, tensor: Tensor) -> Kept:
        """Fill the slot of the tensor that is saved; raises `_AllThere` with the last one."""
        tensor = alone(tensor)
        ref = self._slots[self._n_saved]
        self._n_saved += 1
        slot = None if ref is None else ref()
        if slot is not None:
            if slot.geometry != Geometry.of(tensor):
                raise RuntimeError(_differs(self._name))
            slot.fill(tensor)
        if self._n_saved == len(self._slots):
            raise _AllThere
        return Kept(tensor, self._name)

    def recall(self) -> Any:
        """What the layer chose in the forward."""
        return next(self._notes, None)


class _AllThere(Exception):
    """Ends a replay."""


def _differs(name: str) -> str:
    return (
        f"{name} saved other tensors when it was computed again than in its forward: it depends on "
        "something besides its arguments, parameters and torch's random numbers; leave this block "
        "out of spt.recompute"
    )
