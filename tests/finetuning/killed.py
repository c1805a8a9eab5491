"""Listeners to a run that kill it where they are told to."""

from __future__ import annotations

import os
import signal

from spt_kernels.finetuning.progress import Silent


class Killed(BaseException):
    """As a signal, it is nothing that the code knows of."""


class Heard(Silent):
    """Keeps the lines, and dies when a stage begins, or a line comes, that starts with `at`."""

    def __init__(self, at: str | None = None) -> None:
        self.at = at
        self.lines: list[str] = []
        self.stages: list[str] = []

    def start(self, stage: str, total: int) -> None:
        self.stages.append(stage)
        self._die(f"{stage} begins")

    def advance(self, steps: int = 1, note: str = "") -> None:
        if steps:
            self._die(f"{self.stages[-1]} goes on")

    def say(self, message: str) -> None:
        self.lines.append(message)
        self._die(message)

    def _die(self, event: str) -> None:
        if self.at is not None and event.startswith(self.at):
            raise Killed(event)


class Ends(Silent):
    """Kills the process, as a signal does, at the line that starts with `at`."""

    def __init__(self, at: str) -> None:
        self.at = at

    def say(self, message: str) -> None:
        if message.startswith(self.at):
            os.kill(os.getpid(), signal.SIGKILL)
