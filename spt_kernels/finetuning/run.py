"""One run under way: what it is of, where it writes, how long it has taken, who hears of it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from .facts import config_of
from .progress import Logged
from .run_folder import RunFolder
from .setting import Setting


@dataclass
class Clock:
    """The seconds that a run takes, over all its resumes.

    Attributes:
        spent: before this process began on it.
    """

    spent: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def __call__(self) -> float:
        """The seconds so far."""
        return self.spent + time.monotonic() - self.began


@dataclass
class Run:
    """What the stages of a run have in common.

    Attributes:
        setting: the model and the images.
        folder: where it writes.
        clock: the seconds that it has taken.
        log: told how far it is.
        checkpoint_seconds: least time between two checkpoints.
        keeps_measured: whether the measured sensitivity in the folder is its own.
        is_claimed: whether the folder is this run's yet.
    """

    setting: Setting
    folder: RunFolder
    clock: Clock
    log: Logged
    checkpoint_seconds: float
    keeps_measured: bool = False
    is_claimed: bool = False

    def claim(self) -> None:
        """Make the folder this run's, in place of what is to be overwritten.

        From here on it can be resumed.
        """
        if self.is_claimed:
            return
        if self.folder.replaces:
            self.folder.clear(but_measured=self.keeps_measured)
        self.folder.write_json("config", config_of(self.setting))
        if self.folder["state"].is_file():  # the run goes on to more epochs
            os.replace(self.folder["state"], self.folder["checkpoint"])
        self.folder["result"].unlink(missing_ok=True)
        self.log.write_to(self.folder["log"])
        self.is_claimed = True

    def note_seconds(self) -> None:
        """Keep what it has taken so far, for when it is resumed."""
        self.folder.write_json("seconds", {"seconds": round(self.clock(), 1)})


def spent_in(folder: RunFolder) -> float:
    """The seconds that the run in `folder` has taken, to its last epoch or its end."""
    records = (folder.read_json(name) or {} for name in ("seconds", "result"))
    return max(float(record.get("seconds", 0.0)) for record in records)
