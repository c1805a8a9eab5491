"""Which tasks of a bank are in memory: loaded when needed, the least recently used dropped."""

from __future__ import annotations

import os
from collections import Counter
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
        path: of its file, absolute; None of one that came from a model, which is never dropped.
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
        self._holders: Counter[int] = Counter()  # by the id of a tensor: of tasks in memory
        self._nbytes = 0

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
        if name in self._entries:
            self.remove(name)
        where = None if path is None else os.path.abspath(path)
        self._entries[name] = Entry(where, dict(task.metadata), None)
        self._keep(self._entries[name], held)

    def take(self, name: str) -> BankedTask:
        """A task, read from its file again if it was dropped; it is the latest used then."""
        entry = self.entry(name)
        held = entry.held
        if held is None:
            assert entry.path is not None
            task = read(entry.path)
            held = self._held(task, entry.path)
            self._keep(entry, held)
            entry.metadata = dict(task.metadata)
        self._entries[name] = self._entries.pop(name)
        return held

    def remove(self, name: str) -> None:
        """Forget a task."""
        self._keep(self.entry(name), None)
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
            self._keep(self._entries[name], None)

    def nbytes(self) -> int:
        """Of all tasks in memory, each tensor once; kept up, as every switch asks."""
        return self._nbytes

    def _keep(self, entry: Entry, held: BankedTask | None) -> None:
        """Let a task be in memory, or no longer."""
        for tensor in () if held is None else held.tensors():
            self._nbytes += 0 if self._holders[id(tensor)] else tensor.nbytes
            self._holders[id(tensor)] += 1
        for tensor in () if entry.held is None else entry.held.tensors():
            self._holders[id(tensor)] -= 1
            if not self._holders[id(tensor)]:
                del self._holders[id(tensor)]
                self._nbytes -= tensor.nbytes
        entry.held = held

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
