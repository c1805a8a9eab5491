"""`WrittenState`: which state of a delta its target holds, told by versions and memory."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

Memory = tuple[weakref.ref[Any], int]  # a storage, and where in it a tensor begins


class WrittenState:
    """Which state of a delta its target holds; mutable, and shared by all views of that delta.

    Of what FSDP has sharded it does not tell: shards are written after each step, and what a
    forward sees is gathered from them.
    """

    __slots__ = (
        "by_optimizer",
        "index_name",
        "is_away",
        "is_sharded",
        "local",
        "name",
        "shape",
        "state",
    )

    def __init__(self, name: str = "", index_name: str | None = None) -> None:
        self.name = name  # of the delta in its module
        self.index_name = index_name  # of its positions; None where they are all
        self.shape: torch.Size | None = None  # of the target that positions are of
        self.state: tuple[int, Memory] | None = None
        self.by_optimizer = False
        self.is_away = False  # the target is offloaded: whoever fetches it writes the delta
        self.is_sharded = False
        self.local: Any = None  # see `sharded_delta`

    def __reduce__(self) -> tuple[Any, ...]:
        # versions and memory mean nothing in another process or copy
        return WrittenState, (self.name, self.index_name)

    def matches(self, delta: Tensor | None) -> bool:
        """Whether nothing has changed the delta since `record`; never of one that is gone."""
        if self.state is None or delta is None or self.is_sharded:
            return self.is_sharded and delta is not None
        version, (storage, offset) = self.state
        try:  # the comparison below in a third of its time: every layer asks in every forward
            is_where_it_was = delta.untyped_storage() is storage()
            own_offset: Any = delta.storage_offset()
            return is_where_it_was and delta._version == version and own_offset == offset
        except NotImplementedError:  # given by a transform of torch.func: see `computed`
            return False
        except RuntimeError:
            return self.state == _state_of(delta)

    def record(self, delta: Tensor, *, by_optimizer: bool = False) -> None:
        """Remember that the target holds this state of the delta."""
        if not self.is_sharded:
            self.state = _state_of(delta)
        self.by_optimizer = by_optimizer

    def record_version(self, delta: Tensor, memory: Memory) -> None:
        """`record`, in less time, for a delta in whose storage nothing but the values has changed.

        Args:
            delta: what the target holds.
            memory: from `memory_of`, when the delta's memory was where it is now.
        """
        if self.state is not None:
            self.state = delta._version, memory

    def forget(self) -> None:
        """Treat the target as out of date."""
        self.state = None


def _state_of(delta: Tensor) -> tuple[int, Memory]:
    # The memory is part of it because assigning to `.data` leaves the version as it was
    version = -1 if delta.is_inference() else delta._version
    return version, memory_of(delta)


def memory_of(tensor: Tensor) -> Memory:
    """What tells the memory of one tensor from that of another, be it where that was once."""
    return weakref.ref(tensor.untyped_storage()), int(tensor.storage_offset())
