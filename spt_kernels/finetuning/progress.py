"""How a long computation tells where it is, without knowing who listens."""

from __future__ import annotations

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
