"""Which tasks of a bank are in memory: loaded when needed, the least recently used dropped."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BaseModelMismatch
from ..task.file.format import TaskFile, read
from .banked_task import BankedTask


@dataclass(eq=False)
class Entry:
    """A task that the bank knows; mutable.

    Attributes:
        path: of its file; None of one that came from a model, which is never dropped.
        metadata: what its file told.
        held: the task, while it is in memory.
    """

    path: str | None
    metadata: Mapping[str, Any]
    held: BankedTask | None


class Residents:
    """The tasks of a bank in the order of their use, the latest last.

    Args:
        hold: makes of a `TaskFile` what the bank holds; raises where it fits no base.
        max_tasks: most tasks in memory; None for any number.
        max_bytes: most bytes that tasks take in memory; None for any number.
    """

    def __init__(
        self,
        hold: Callable[[TaskFile], BankedTask],
        max_tasks: int | None,
        max_bytes: int | None,
    ) -> None:
        self._hold = hold
        self._max_tasks = max_tasks
        self._max_bytes = max_bytes
        self._entries: dict[str, Entry] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def in_memory(self) -> list[str]:
        """Names of the tasks in memory, the least recently used first."""
        return [name for name, entry in self._entries.items() if entry.held is not None]

    def entry(self, name: str) -> Entry:
        """What is known of a task; `KeyError` if there is no such."""
        if name not in self._entries:
            known = ", ".join(self.names()) or "none"
            raise KeyError(f"the bank has no task {name!r}; it has {known}")
        return self._entries[name]

    def put(self, name: str, task: TaskFile, path: str | os.PathLike[str] | None) -> None:
        """Take a task in, in place of one of the same name."""
        held = self._held(task, path)
        self._entries.pop(name, None)
        self._entries[name] = Entry(
            None if path is None else os.fspath(path), dict(task.metadata), held
        )

    def take(self, name: str) -> BankedTask:
        """A task, read from its file again if it was dropped; it is the latest used then."""
        entry = self.entry(name)
        if entry.held is None:
            assert entry.path is not None
            task = read(entry.path)
            entry.held, entry.metadata = self._held(task, entry.path), dict(task.metadata)
        self._entries[name] = self._entries.pop(name)
        return entry.held

    def remove(self, name: str) -> None:
        """Forget a task."""
        self.entry(name)
        del self._entries[name]

    def drop_beyond_limits(self, keep: Collection[str]) -> None:
        """Drop the least recently used from memory until what is left is within the limits.

        Args:
            keep: names of tasks that are needed now, and stay.
        """
        for name in self._droppable(keep):
            too_many = self._max_tasks is not None and len(self.in_memory()) > self._max_tasks
            too_large = self._max_bytes is not None and self.nbytes() > self._max_bytes
            if not (too_many or too_large):
                return
            self._entries[name].held = None

    def nbytes(self) -> int:
        """Of all tasks in memory, each tensor once."""
        held = [entry.held for entry in self._entries.values() if entry.held is not None]
        tensors = {id(tensor): tensor for task in held for tensor in task.tensors()}
        return sum(tensor.nbytes for tensor in tensors.values())

    def _droppable(self, keep: Collection[str]) -> Iterator[str]:
        for name in self.in_memory():
            if name not in keep and self._entries[name].path is not None:
                yield name

    def _held(self, task: TaskFile, path: str | os.PathLike[str] | None) -> BankedTask:
        try:
            return self._hold(task)
        except BaseModelMismatch as error:
            where = "the tuned model" if path is None else os.fspath(path)
            raise BaseModelMismatch(f"{where}: made for another base model: {error}") from error
