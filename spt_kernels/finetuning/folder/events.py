"""`EventFiles`: the figures of a run as TensorBoard reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ...errors import needed


class Figures(Protocol):
    """What training was like, up to a point of it."""

    @property
    def at(self) -> int:
        """Of how many epochs or iterations it is the last."""

    def scalars(self) -> dict[str, float | None]:
        """Each figure by the name that it is shown under, `None` where there is none."""


class EventFiles:
    """Writes a scalar for each figure of a run into a folder of their own; closed as a context.

    A run that goes on writes the figures before it again, in place of the old files: none
    is there twice, and the time that a run was stopped for does not show.

    Args:
        folder: which is made, or emptied, when there is something to write.
        config: of the run, shown as text.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder = folder
        self._config = config
        self._writer: Any = None
        self._written = 0

    def write(self, history: Sequence[Figures]) -> None:
        """Add the figures that are not written yet."""
        for row in history[self._written :]:
            self._add(row.scalars(), row.at)
        self._written = len(history)
        self._open().flush()

    def finish(self, at: int, scores: Mapping[str, float | None]) -> None:
        """Add what the test images say, if there are any."""
        self._add(scores, at)
        self._open().flush()

    def __enter__(self) -> EventFiles:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add(self, scalars: Mapping[str, float | None], at: int) -> None:
        writer = self._open()
        for name, value in scalars.items():
            if value is not None:
                writer.add_scalar(name, value, at)

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            shutil.rmtree(self._folder, ignore_errors=True)
            self._writer = SummaryWriter(str(self._folder))
            text = json.dumps(self._config, indent=2)
            self._writer.add_text("config", f"```json\n{text}\n```")
        return self._writer


def check_can_write_events() -> None:
    """Raise `MissingExtra` where tensorboard is not installed: before the work, not after it."""
    with needed("--tensorboard", "tensorboard"):
        import tensorboard  # noqa: F401
