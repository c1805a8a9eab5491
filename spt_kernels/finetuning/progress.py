"""How a long computation tells where it is, without knowing who listens."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol


class Progress(Protocol):
    """Listens to a computation that runs in stages, one after the other."""

    def start(self, stage: str, total: int) -> None:
        """A stage of `total` steps begins; the one before it is over."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """So many steps of the stage are done; `note` says how it stands."""

    def say(self, message: str) -> None:
        """One line worth keeping."""


class Silent:
    """A `Progress` that says nothing."""

    def start(self, stage: str, total: int) -> None:
        """Say nothing."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Say nothing."""

    def say(self, message: str) -> None:
        """Say nothing."""


class Logged:
    """A `Progress` that passes on what it hears, and writes stages and lines to a file.

    Nothing is written before `write_to` names the file, which then gets all that was heard so far.
    """

    def __init__(self, listener: Progress) -> None:
        self._listener = listener
        self._path: Path | None = None
        self._lines: list[str] = []

    def write_to(self, path: Path) -> None:
        """Append to the file at `path` from now on."""
        self._path = path
        self._write()

    def start(self, stage: str, total: int) -> None:
        """Pass it on, and write a line."""
        self._listener.start(stage, total)
        self._note(f"{stage} ({total:,})")

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Pass it on."""
        self._listener.advance(steps, note)

    def say(self, message: str) -> None:
        """Pass it on, and write it."""
        self._listener.say(message)
        self._note(message)

    def _note(self, line: str) -> None:
        self._lines.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")
        self._write()

    def _write(self) -> None:
        if self._path is None or not self._lines:
            return
        # a file or class may be called by bytes that are no UTF-8
        with open(self._path, "a", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(self._lines)
        self._lines.clear()


def duration(seconds: float) -> str:
    """As one says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
