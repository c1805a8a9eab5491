"""The output folder of one run: the names of its files, and whether it may be written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ...errors import is_out_of_memory
from ...files.atomic import write_atomically
from ...files.json_file import JsonObject, read_object, read_objects
from ...files.json_kinds import checked
from .run_values import RUN_VALUES

J = TypeVar("J")

FILES = {
    "config": "config.json",
    "log": "log.txt",
    "sensitivity": "sensitivity.safetensors",
    "measured": "sensitivity.json",  # what that was measured on
    "plan": "plan.safetensors",
    "supernet": "supernet.pt",  # the state of a supernet's training, also when that is over
    "search": "search.jsonl",  # the accuracies of its architectures so far
    "architecture": "architecture.json",
    "checkpoint": "checkpoint.pt",  # of a run that is under way
    "seconds": "seconds.json",  # what that has taken so far
    "state": "state.pt",  # what the checkpoint becomes when the run is over
    "metrics": "metrics.jsonl",
    "task": "task.safetensors",
    "trained": "trained.safetensors",
    "model": "model.safetensors",
    "best_task": "best-task.safetensors",  # of the epoch that was best on the validation images
    "best_trained": "best-trained.safetensors",
    "best_model": "best-model.safetensors",
    "predictions": "predictions.jsonl",
    "result": "result.json",
    "sensitivity_picture": "sensitivity.png",
    "curves_picture": "curves.png",
}

EVENTS = "tensorboard"  # a folder, of TensorBoard's own files

# What a start that failed may leave: long to measure, and good for the next try
_OF_NO_RUN = frozenset({FILES["sensitivity"], FILES["measured"]})


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it makes. `FILES` names the files.

    Attributes:
        path: the folder.
        made: the folders, innermost first, that `open` had to make.
        replaces: whether what is in it is to be overwritten.
    """

    path: Path
    made: tuple[Path, ...] = ()
    replaces: bool = False

    def __getitem__(self, name: str) -> Path:
        return self.path / FILES[name]

    @property
    def left(self) -> Path:
        """What a run goes on from: its state, where it is over, or its checkpoint."""
        return self["state" if self["state"].is_file() else "checkpoint"]

    @property
    def events(self) -> Path:
        """The folder of what TensorBoard reads."""
        return self.path / EVENTS

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, resume: bool = False, force: bool = False
    ) -> RunFolder:
        """Make the folder, or check that an existing one may be written to.

        Args:
            path: the folder.
            resume: go on with what is in it.
            force: whatever an earlier run left in it; `clear` removes that.

        Raises:
            ValueError: it holds more than what a failed start leaves and neither `resume` nor
                `force`, or cannot be written to.
        """
        if resume and force:
            raise ValueError("resume, force: expected one of them, got both")
        path = Path(path)
        folder = cls(path, tuple(p for p in (path, *path.parents) if not p.exists()))
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            found = {entry.name for entry in folder.path.iterdir()} - _OF_NO_RUN
            if found and not (resume or force):
                raise ValueError(
                    f"output: {folder.path} is not empty (`resume` goes on with the run in it, "
                    "`force` overwrites it)"
                )
            probe = folder.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"output: cannot write to {folder.path} ({error.strerror or error})"
            ) from error
        return replace(folder, replaces=force and bool(found))

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """A start that fails within leaves nothing in the way of the next one.

        What was there before stays, and so does a measured sensitivity. A run that has an epoch
        behind it, is interrupted, or has met the end of the memory, in less of which it can go on,
        can be resumed and stays as well.
        """
        was_there = self["config"].is_file()
        try:
            yield
        except Exception as error:  # any at all: it goes on to the caller as it is
            has_begun = self["metrics"].is_file() or self["supernet"].is_file()
            goes_on = has_begun or (is_out_of_memory(error) and self["config"].is_file())
            if not was_there and not goes_on:
                self._remove(set(FILES.values()) - _OF_NO_RUN)
                with contextlib.suppress(OSError):  # there is something in it
                    for folder in self.made:
                        folder.rmdir()
            raise

    def clear(self, *, but_measured: bool = False, but: str | None = None) -> None:
        """Remove the files of an earlier run; files of any other name stay.

        Args:
            but_measured: keep a measured sensitivity.
            but: a file to keep, if it is one of them.
        """
        kept = _OF_NO_RUN if but_measured else set()
        self._remove(set(FILES.values()) - kept - {self.name_of(but)})
        shutil.rmtree(self.events, ignore_errors=True)

    def _remove(self, names: set[str]) -> None:
        # the config last: as long as it is there, no other run takes what is left for its own
        for name in sorted(names, key=lambda name: name == FILES["config"]):
            (self.path / name).unlink(missing_ok=True)

    def written(self) -> list[str]:
        """Names of the files that are there, and of the folder of events."""
        files = [file for file in FILES.values() if (self.path / file).is_file()]
        return [*files, f"{EVENTS}/"] if self.events.is_dir() else files

    def name_of(self, path: str | None) -> str:
        """The name that a file has as one of a run's in this folder; empty if it is none."""
        there = (name for name in FILES.values() if _is_same(self.path / name, path))
        return next(there, "")

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, whole or not at all."""
        write_atomically(self[name], (json.dumps(value, indent=2) + "\n").encode())

    def read_json(self, name: str) -> JsonObject | None:
        """Read a JSON file, `None` if it is not there; `ValueError` if it is damaged.

        So is a value of another kind than `RUN_VALUES` has, and a name that is asked of what was
        read and is not in it.
        """
        if not self[name].is_file():
            return None
        return checked(read_object(self[name]), RUN_VALUES.get(name, {}))

    def read_config(self) -> JsonObject | None:
        """What its run is of; `None` without a run.

        A `config.json` may be another program's, as that of a model of transformers.

        Raises:
            ValueError: it is damaged.
        """
        if not self["config"].is_file():
            return None
        config = read_object(self["config"])
        is_ours = isinstance(config.get("job"), dict)
        return checked(config, RUN_VALUES["config"]) if is_ours else None

    def job_of(self, config: JsonObject, from_json: Callable[[Any], J]) -> J:
        """The job that the folder's `config` is of.

        Args:
            config: as it was read.
            from_json: of the job's class.

        Raises:
            ValueError: it cannot be read, as one that another version of the package wrote, or a
                value in it is none that such a job may have.
        """
        try:
            return from_json(config.plain()["job"])
        except ValueError as error:
            raise ValueError(f"{self['config']}: the job in it: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self['config']}: the job in it is not of this version ({error!r})"
            ) from error

    def write_lines(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write a file of JSON lines, whole or not at all."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self[name], text.encode())

    def read_lines(self, name: str) -> list[JsonObject]:
        """Read a file of JSON lines; errors as `read_json`."""
        kinds = RUN_VALUES.get(name, {})
        return [checked(row, kinds) for row in read_objects(self[name])]


def _is_same(own: Path, path: str | None) -> bool:
    return path is not None and own.is_file() and Path(path).is_file() and own.samefile(path)
