"""One cell of a benchmark: a task, a method and a seed; its run, and what came of it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..files.atomic import write_atomically
from ..files.json_file import read_object
from ..files.json_kinds import OBJECT, checked
from ..finetuning.device import pick_device
from ..finetuning.folder.run_folder import FILES, RunFolder
from ..finetuning.job.job import FinetuneJob
from ..finetuning.pipeline import finetune
from ..finetuning.progress import Progress, Silent
from ..methods.noah_architecture import NoahArchitecture
from .candidates import Options, candidates_of, named
from .setting import BenchmarkSetting
from .shared_sensitivity import give, store_of, take

CHOICE = "choice.json"  # of a task and method: every candidate, and which was best
DIVERGED = "diverged.json"  # of a candidate that cannot be trained
# What a candidate leaves
_OF_CANDIDATE = frozenset(
    FILES[name] for name in ("config", "log", "metrics", "result", "architecture")
) | {DIVERGED}
# What of a finished run is of no more use
_IN_THE_WAY = ("state", "sensitivity", "measured")


@dataclass(frozen=True)
class Cell:
    """A run of the grid, by the names that the setting knows.

    Attributes:
        task: its name.
        method: its name.
        seed: of everything drawn.
    """

    task: str
    method: str
    seed: int

    @property
    def folder(self) -> Path:
        """Its run's, below the benchmark's."""
        return Path(self.task, self.method, f"seed{self.seed}")


@dataclass(frozen=True)
class Place:
    """Where and with what runs compute; none of it is part of the setting.

    Attributes:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        workers: processes that decode images; 0 decodes in the run's own.
    """

    device: str = "auto"
    workers: int = 0


@dataclass(frozen=True)
class CellResult:
    """What came of a cell.

    Attributes:
        cell: which one.
        test_accuracy: top-1 in 0 to 1, of the last epoch, on the task's test images.
        val_accuracy: likewise on its validation images, `None` where the run has none.
        trained_parameters: beside the head.
        trained_share: of the backbone.
        seconds: that the run took, over all its resumes.
        chosen: the options that were best on the validation images; empty where none were given.
        device: the card, or `cpu`.
        threads: of the CPU.
        versions: of this package and torch.
    """

    cell: Cell
    test_accuracy: float
    val_accuracy: float | None
    trained_parameters: int
    trained_share: float
    seconds: float
    chosen: Options = field(default_factory=dict)
    device: str = ""
    threads: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, output: Path, cell: Cell) -> CellResult | None:
        """What the finished run of `cell` left; `None` if it is not finished."""
        result = RunFolder(output / cell.folder).read_json("result")
        if result is None or result["test_accuracy"] is None:
            return None
        made = _read_choice(output, cell)
        return cls(
            cell,
            result["test_accuracy"],
            result["val_accuracy"],
            result["trained_parameters"],
            result["trained_parameters"] / result["backbone_parameters"],
            result["seconds"],
            {} if made is None else made["chosen"],
            result["device"],
            result["threads"],
            result["versions"],
        )


def run_cell(
    setting: BenchmarkSetting,
    cell: Cell,
    output: str | os.PathLike[str],
    place: Place | None = None,
    progress: Progress | None = None,
) -> CellResult:
    """Choose what there is to choose, train, test once; a cell that is finished is only read.

    One that was interrupted goes on where it was. Candidates are trained and compared on the
    task's validation images with the benchmark's first seed, whatever the cell's. What a method
    searches for is searched for there too.

    Args:
        setting: of the benchmark.
        cell: one of its own.
        output: the benchmark's folder; what the cell makes goes to `cell.folder` below.
        place: where it runs.
        progress: told how far it is.

    Raises:
        ValueError: the task's images, or what `finetune` finds fault with.
        FloatingPointError: the loss is not finite; of every candidate, where there are such.
    """
    output, place = Path(output), place or Place()
    done = CellResult.read(output, cell)
    if done is not None:
        return done
    task, method = setting.task(cell.task), setting.method(cell.method)
    setting.check_images(task)
    options = _chosen(setting, cell, output, place, progress)
    if method.is_searched:  # what the candidate has found, by images that are no test images
        found = _candidate_folder(output, cell, options)["architecture"]
        method = replace(method, architecture=NoahArchitecture.load(found))
    job = setting.job(task.final, method, cell.seed, options)
    _run(job, RunFolder(output / cell.folder), output / cell.task, place, progress)
    tidy(output, cell)
    done = CellResult.read(output, cell)
    if done is None:
        raise ValueError(f"tasks: {task.name} has no test images")
    return done


def tidy(output: Path, cell: Cell) -> None:
    """Remove what of a finished cell is of no more use, if it is there.

    No run of a benchmark is made longer, and the next one has the sensitivity.
    """
    folder = RunFolder(output / cell.folder)
    for name in _IN_THE_WAY:
        folder[name].unlink(missing_ok=True)


def run_candidate(
    setting: BenchmarkSetting,
    cell: Cell,
    options: Options,
    output: str | os.PathLike[str],
    place: Place | None = None,
    progress: Progress | None = None,
) -> float | None:
    """Train one candidate and return its accuracy on the validation images, `None` if it diverged.

    Arguments and errors as `run_cell`; the seed is the benchmark's first. The test images are
    neither read nor known here.
    """
    output, place = Path(output), place or Place()
    task, method = setting.task(cell.task), setting.method(cell.method)
    folder = _candidate_folder(output, cell, options)
    if not (folder["result"].is_file() or (folder.path / DIVERGED).is_file()):
        job = setting.job(task.choose, method, setting.seeds[0], options)
        try:
            _run(job, folder, output / cell.task, place, progress)
        except FloatingPointError as error:  # no failure of the benchmark: the worst of them
            folder.path.mkdir(parents=True, exist_ok=True)
            _write(folder.path / DIVERGED, {"reason": str(error)})
    for entry in folder.path.iterdir():  # also where a kill came between
        if entry.name not in _OF_CANDIDATE:
            entry.unlink()
    return read_candidate(output, cell, options)


def read_candidate(output: Path, cell: Cell, options: Options) -> float | None:
    """The accuracy on the validation images of a candidate that was run, `None` if it diverged.

    Raises:
        ValueError: there are no validation images.
    """
    folder = _candidate_folder(output, cell, options)
    if (folder.path / DIVERGED).is_file():
        return None
    result = folder.read_json("result")
    assert result is not None
    if result["val_accuracy"] is None:
        raise ValueError(f"choices: task {cell.task!r} has no validation images to choose by")
    return float(result["val_accuracy"])


def is_chosen(output: Path, cell: Cell) -> bool:
    """Whether the options of a cell's task and method have been chosen."""
    return _read_choice(output, cell) is not None


def _chosen(
    setting: BenchmarkSetting,
    cell: Cell,
    output: Path,
    place: Place,
    progress: Progress | None,
) -> Options:
    """The best candidate, among equals the first."""
    tried = candidates_of(setting.choices, setting.method(cell.method))
    if not tried:
        return {}
    made = _read_choice(output, cell)
    if made is not None:
        return dict(made["chosen"])
    scores = [run_candidate(setting, cell, options, output, place, progress) for options in tried]
    seen = [score for score in scores if score is not None]
    if not seen:
        names = " nor ".join(map(named, tried))
        raise FloatingPointError(f"the loss is not finite with {names}")
    best = tried[scores.index(max(seen))]
    rows = [
        {"options": options, "val_accuracy": score}
        for options, score in zip(tried, scores, strict=True)
    ]
    _write(_choice_folder(output, cell).with_name(CHOICE), {"candidates": rows, "chosen": best})
    return best


def _run(
    job: FinetuneJob,
    folder: RunFolder,
    task_folder: Path,
    place: Place,
    progress: Progress | None,
) -> dict[str, Any]:
    """Run a job, with the sensitivity that another run of the task has measured, if it agrees."""
    store = store_of(job, task_folder)
    if store is not None:
        take(store, folder)
    with _on(pick_device(place.device)):
        result = finetune(
            job,
            folder.path,
            resume=True,
            device=place.device,
            workers=place.workers,
            progress=progress or Silent(),
        )
    if store is not None:
        give(folder, store)
    return result


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Make a card the current one, and let the peak that is told of it be of what comes now."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.init()
    with torch.cuda.device(device):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield


def _candidate_folder(output: Path, cell: Cell, options: Options) -> RunFolder:
    return RunFolder(_choice_folder(output, cell) / named(options))


def _choice_folder(output: Path, cell: Cell) -> Path:
    return output / cell.task / cell.method / "choice"


def _read_choice(output: Path, cell: Cell) -> dict[str, Any] | None:
    return read_choice(_choice_folder(output, cell).parent)


def read_choice(folder: Path) -> dict[str, Any] | None:
    """What was chosen for the runs in a folder of seeds, and among what; `None` if nothing was."""
    path = folder / CHOICE
    return checked(read_object(path), {"chosen": OBJECT}) if path.is_file() else None


def _write(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
