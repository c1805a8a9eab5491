"""One run under way: what it is of, where it writes, how long it has taken, who hears of it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ...distributed import Processes
from ...files.json_file import JsonObject
from ..folder.run_folder import FILES, RunFolder
from ..progress import Logged
from .description import SEGMENTATION

S = TypeVar("S")
_COMMANDS = {None: "finetune", SEGMENTATION: "segment"}  # by the kind that a run's config tells


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
class Run(Generic[S]):
    """What the stages of a run have in common.

    Attributes:
        setting: the model and the images.
        config: all that it takes to build the run's model and to go on with the run.
        folder: where it writes.
        clock: the seconds that it has taken.
        log: told how far it is.
        checkpoint_seconds: least time between two checkpoints.
        keeps_measured: whether the measured sensitivity in the folder is its own.
        is_claimed: whether the folder is this run's yet.
        processes: that share the run; the first writes what stays.
    """

    setting: S
    config: Mapping[str, Any]
    folder: RunFolder
    clock: Clock
    log: Logged
    checkpoint_seconds: float
    keeps_measured: bool = False
    is_claimed: bool = False
    processes: Processes = field(default_factory=Processes)

    def claim(self) -> None:
        """Make the folder this run's, in place of what is to be overwritten.

        From here on it can be resumed.
        """
        if self.is_claimed:
            return
        if self.folder.replaces:
            given = self.config["job"]["sensitivity"]  # which may be the earlier run's
            self.folder.clear(but_measured=self.keeps_measured, but=given)
        self.folder.write_json("config", self.config)
        if self.folder["state"].is_file():  # the run is made longer
            os.replace(self.folder["state"], self.folder["checkpoint"])
        self.folder["result"].unlink(missing_ok=True)
        self.log.write_to(self.folder["log"])
        self.is_claimed = True

    def note_seconds(self) -> None:
        """Keep what it has taken so far, for when it is resumed."""
        self.folder.write_json("seconds", {"seconds": round(self.clock(), 1)})

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write down what came of it; its state stays, so that it can be made longer."""
        self.folder.write_json("result", result)
        os.replace(self.folder["checkpoint"], self.folder["state"])
        self.folder["seconds"].unlink(missing_ok=True)


def finished_in(folder: RunFolder, job: Any, counted: str) -> dict[str, Any] | None:
    """The result of the run in `folder`, if that is over: as long as `job`, or ended early.

    Args:
        folder: of the run.
        job: what is to be run; its class reads what is in the folder.
        counted: what its recipe says how many of, as `"epochs"`.

    Raises:
        ValueError: the folder holds another job's, or what the run needs to go on is gone.
    """
    config = config_in(folder, job.command)
    if config is None:
        return None
    found = folder.job_of(config, type(job).from_json)
    if (difference := job.difference_from(found)) is not None:
        raise ValueError(f"output: {folder.path} holds another job ({difference})")
    result = folder.read_json("result")
    if result is None:
        return None
    wanted = getattr(job.recipe, counted)
    if result[counted] == wanted or result.get("stopped_early"):
        return result.plain()
    if not (folder["checkpoint"].is_file() or folder["state"].is_file()):
        raise ValueError(
            f"{counted}: the run in {folder.path} ended after {result[counted]:,}, and without its "
            f"{FILES['state']} it cannot go on to {wanted:,}"
        )
    return None


def check_weights_stay(folder: RunFolder, weights: str | None) -> None:
    """Refuse base weights that go with the run that is to be overwritten; `ValueError`."""
    if folder.replaces and folder.name_of(weights):
        raise ValueError(
            f"weights: {weights} is of the run that is to be overwritten, and what is tuned from "
            "it would be of no use without: take another output"
        )


def config_in(folder: RunFolder, command: str) -> JsonObject | None:
    """What the run of a command in `folder` is of; `None` without a run.

    Raises:
        ValueError: the run is of another command, which is named.
    """
    config = folder.read_config()
    if config is None and folder["config"].is_file():
        raise ValueError(f"output: {folder['config']} is of another program, and of no run")
    if config is None:
        return None
    own = _COMMANDS.get(config.get("kind"), "another command")
    if own != command:
        hint = f"; spt-kernels {own} --resume goes on with it" if own in _COMMANDS.values() else ""
        raise ValueError(f"output: {folder.path} holds a run of {own}, not of {command}{hint}")
    return config


def spent_in(folder: RunFolder) -> float:
    """The seconds that the run in `folder` has taken, to its last epoch or its end."""
    records = (folder.read_json(name) for name in ("seconds", "result"))
    return max(0.0 if record is None else float(record.get("seconds", 0.0)) for record in records)
