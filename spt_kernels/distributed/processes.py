"""`Processes`: who shares a computation, and what small things they tell each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from ..errors import OtherProcessFailed
from .sum import sum_in_place

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that share a computation; each of them calls the same methods in turn.

    Attributes:
        group: of `torch.distributed`; None where this process is alone.
        rank: of this process in the group.
        size: how many there are.
    """

    group: Any = None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: Any) -> Processes:
        """Those of a process group; this one alone for None.

        Raises:
            TypeError: it is no process group.
            ValueError: this process is not in it, or there is no process group as yet.
        """
        if group is None:
            return cls()
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "group: torch.distributed is not initialised: call init_process_group first"
            )
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group: this process is not in it")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "group: expected a process group, such as torch.distributed.group.WORLD, got "
                f"{type(group).__name__}"
            )
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ValueError("group: this process is not in it")
        return cls(group, rank, size) if size > 1 else cls()

    @classmethod
    def of_all(cls) -> Processes:
        """All that there are; this one alone where there is no process group."""
        some = dist.is_available() and dist.is_initialized()
        return cls.of(dist.group.WORLD) if some else cls()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, n: int) -> int:
        """How many of `n` things fall to this process where thing `i` falls to rank `i % size`."""
        return n // self.size + (self.rank < n % self.size)

    def gather(self, value: T) -> list[T]:
        """What every process has, by rank; small things, which are pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors over the processes, in place; see `sum_in_place`."""
        if self.size > 1:
            sum_in_place(tensors, self.group)

    def together(self, act: Callable[[], T]) -> T:
        """Do what every process does for itself; where it fails in one of them, it fails in all.

        Raises:
            OtherProcessFailed: it failed in another process, or in one of a lower rank as well;
                says where, and why.
            Exception: it failed here, so that one process raises what went wrong.
        """
        if self.size == 1:
            return act()
        made: Any = None
        error: Exception | None = None
        try:
            made = act()
        except Exception as raised:  # any at all: the others are told, and it goes on from here
            error = raised
        told = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        for rank, message in enumerate(told):
            if message is not None:
                if error is not None and rank == self.rank:
                    raise error
                raise OtherProcessFailed(f"process {rank} cannot go on: {message}") from error
        return made  # type: ignore[no-any-return]

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, which fails everywhere if it fails there.

        Raises:
            OtherProcessFailed: it failed in the first process, which raises its own error.
        """
        if self.size == 1:
            return make()
        made = self.together(make if self.is_first else lambda: None)
        told: list[Any] = [made]
        first = dist.get_global_rank(self.group, 0)
        dist.broadcast_object_list(told, src=first, group=self.group)
        return told[0]  # type: ignore[no-any-return]
