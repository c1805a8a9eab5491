"""`Recording`: what a layer notes of a forward that may be run again within the backward.

A frame of `spt_kernels.recomputation` is one. It is found by the saved-tensor hooks that are in
use, which torch keeps for each thread: the forward and the backward need share nothing else.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ...ops.torch_internals import hooks_in_use


class Packed(Protocol):
    """What stands in a graph for a tensor."""

    def read(self) -> Tensor:
        """The tensor, as often as it is asked for while the graph is there."""
        ...


def unpack(packed: Packed) -> Tensor:
    """The unpack hook of all recordings: it holds on to none of them, and is known by itself."""
    return packed.read()


class Recording:
    """Notes of what the layers of a forward chose, which they go by when they are run again.

    Its bound method `pack` and the function `unpack` are the hooks that are in use meanwhile.
    """

    def note(self, value: Any) -> None:
        """Remember a choice; it must not hold on to the graph, which holds on to this."""

    def recall(self) -> Any:
        """The next choice of the forward that is run again; None in that forward itself."""
        return None

    def holds(self, x: Tensor) -> bool:
        """Whether something that shares the storage of `x` was saved here, so that `x` is free."""
        return False


def recording_in_use() -> Recording | None:
    """The recording that what is saved now goes to; None where other hooks are in use, or none."""
    return recording_of(hooks_in_use())


def recording_of(hooks: Any) -> Recording | None:
    """The recording that hooks are of; None where they are others', or none."""
    owner = None if hooks is None else getattr(hooks[0], "__self__", None)
    return owner if isinstance(owner, Recording) else None
