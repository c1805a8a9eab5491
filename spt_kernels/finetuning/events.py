"""`EventFiles`: the figures of a run as TensorBoard reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import needed
from .training import EpochFigures


class EventFiles:
    """Writes a scalar for each figure of each epoch into a folder of their own.

    A run that goes on writes those of the epochs before it again, in place of the old files: none
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

    def write(self, history: list[EpochFigures]) -> None:
        """Add the epochs that are not written yet."""
        writer = self._open()
        for row in history[self._written :]:
            figures = {
                "loss/train": row.train_loss,
                "loss/validation": row.val_loss,
                "accuracy/validation": row.val_accuracy,
                "learning rate": row.lr,
                "milliseconds of a step": row.step_ms,
            }
            for name, value in figures.items():
                if value is not None:
                    writer.add_scalar(name, value, row.epoch)
        self._written = len(history)
        writer.flush()

    def close(self, epoch: int, test_accuracy: float | None) -> None:
        """Add what the test images say, if there are any."""
        writer = self._open()
        if test_accuracy is not None:
            writer.add_scalar("accuracy/test", test_accuracy, epoch)
        writer.close()

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
