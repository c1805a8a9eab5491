"""A benchmark from its setting to its table: what is missing is run, and what fails is told."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..files.atomic import write_atomically
from ..files.picture import check_can_draw
from ..finetuning.base.models import build_empty
from ..finetuning.device import pick_device
from ..finetuning.folder.run_folder import RunFolder
from ..finetuning.progress import Progress, Silent, duration
from ..finetuning.run.same_inputs import WEIGHTS, told_of_file
from .cell import CellResult, Place, read_candidate
from .lock import LOCK, only_one
from .piece import SETTING, Failure, Piece, cells_of, read_setting, unfinished, write_setting
from .processes import Processes
from .schedule import InProcess, Report, Workers, run_pieces
from .setting import BenchmarkSetting
from .table import FAILED, BenchmarkTable, benchmark_table


def run_benchmark(
    setting: BenchmarkSetting,
    output: str | os.PathLike[str],
    *,
    devices: Sequence[str] = ("auto",),
    jobs: int = 1,
    workers: int = 0,
    ray: str | None = None,
    progress: Progress | None = None,
) -> BenchmarkTable:
    """Run all cells of `setting` that the folder `output` has not yet, and return its whole table.

    It can be stopped at any moment and called again: finished cells are read, one that was
    interrupted goes on, one that failed is tried again. A cell that fails stops no other; its
    reason is in the table, and in `failed.json` in its folder. The folder may hold other tasks,
    methods and seeds of the same setting, which stay; on the same place with the same number of
    threads the result is the same to the bit, however often it was stopped.

    Args:
        setting: what to run.
        output: the folder for all of it; a cell's is `<task>/<method>/seed<k>` in it.
        devices: those to use, each `auto`, `cpu`, `cuda` or `cuda:N`; `all` alone is every GPU.
        jobs: processes on each device; they share the CPU's threads, unless `OMP_NUM_THREADS` is
            set. 0 runs everything in this process, on one device.
        workers: processes of each that decode images.
        ray: run on the Ray cluster at this address, `local` for one of this place alone, in place
            of `devices` and `jobs`. The output folder must be the same on all its nodes.
        progress: told how far it is.

    Raises:
        ValueError: a setting, device or folder that cannot be, or a folder of another setting.
        MissingExtra: Ray is asked for and not installed.
    """
    progress, output = progress or Silent(), Path(output).resolve()
    places = _places(devices, jobs, workers)
    check_can_draw()  # what every run does at its end
    for task in setting.tasks:
        setting.check_images(task)
    _check_model(setting)
    _check_folder(output)
    with only_one(output):
        whole = _whole(setting, output)
        _check_values(whole, output)
        write_setting(output, whole)
        wanted = cells_of(setting)
        pieces = unfinished(whole, output, wanted)
        n_finished = len(wanted) - sum(piece.options is None for piece in pieces)
        if n_finished:
            progress.say(f"{n_finished} of {len(wanted)} runs are finished already")
        if pieces:
            by = _workers(output, places, is_here=jobs == 0, ray=ray)
            progress.start("benchmark", len(pieces))
            with by:
                run_pieces(pieces, by, _Course(output, len(pieces), by.n_places, progress))
    return benchmark_table(output)


def _whole(setting: BenchmarkSetting, output: Path) -> BenchmarkSetting:
    """The setting with all that the folder was for before."""
    if (output / SETTING).is_file():
        try:
            return setting.joined(read_setting(output))
        except ValueError as error:
            raise ValueError(f"output: {output} is of another benchmark ({error})") from error
    return setting


def _check_values(setting: BenchmarkSetting, output: Path) -> None:
    """Refuse a file of weights that holds other values than when the runs in `output` began."""
    if setting.model.weights is None:
        return
    configs = (RunFolder(output / cell.folder).read_config() for cell in cells_of(setting))
    begun = next((told for config in configs if config and (told := config.get(WEIGHTS))), None)
    if begun is not None and begun != told_of_file(setting.model.weights):
        raise ValueError(
            f"weights: the runs in {output} began with other values in {setting.model.weights}; "
            "put them back as they were, or begin anew in another folder"
        )


class _Course:
    """Keeps and tells what came of each piece, and when the last will be done."""

    def __init__(self, output: Path, n_all: int, n_places: int, progress: Progress) -> None:
        self._output, self._n_places, self._progress = output, n_places, progress
        self._n_done, self._n_all = 0, n_all
        self._began = time.monotonic()

    def __call__(self, report: Report) -> None:
        """Take note."""
        piece = report.piece
        if report.note:
            self._progress.advance(0, f"{piece.name}: {report.note}")
            return
        self._n_done += 1
        folder = self._output / piece.cell.folder
        if report.failure is None:
            said = self._outcome(piece, folder)
        else:
            said = f"failed: {report.failure.reason}"
            if piece.options is None:
                _write_failure(folder, report.failure)
        self._progress.advance(1, piece.name)
        self._progress.say(f"{self._n_done}/{self._n_all}  {piece.name}: {said}{self._time_left()}")

    def _outcome(self, piece: Piece, folder: Path) -> str:
        if piece.options is not None:
            accuracy = read_candidate(self._output, piece.cell, piece.options)
            told = "its loss is not finite" if accuracy is None else f"{100 * accuracy:.1f} %"
            return f"{told} on validation images"
        (folder / FAILED).unlink(missing_ok=True)
        result = CellResult.read(self._output, piece.cell)
        assert result is not None
        return f"{100 * result.test_accuracy:.1f} % in {duration(result.seconds)}"

    def _time_left(self) -> str:
        """By the pace so far; of those that are under way, half is taken to be done."""
        left = self._n_all - self._n_done
        if not left:
            return ""
        done = self._n_done + min(self._n_places - 1, left) / 2
        return f", about {duration((time.monotonic() - self._began) / done * left)} left"


def _places(devices: Sequence[str], jobs: int, workers: int) -> list[Place]:
    """One for each process."""
    for name, value in (("jobs", jobs), ("workers", workers)):
        if value < 0:
            raise ValueError(f"{name}: expected 0 or more processes, got {value}")
    if not devices:
        raise ValueError("devices: expected at least one, got none")
    if list(devices) == ["all"]:
        pick_device("cuda")  # or refuses
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if len(set(devices)) < len(devices):
        raise ValueError(f"devices: one is named twice in {', '.join(devices)}")
    for name in devices:
        pick_device(name)
    if jobs == 0 and len(devices) > 1:
        raise ValueError("jobs: with 0, in this process, there is one device")
    return [Place(device, workers) for device in devices for _ in range(max(1, jobs))]


def _workers(output: Path, places: list[Place], *, is_here: bool, ray: str | None) -> Workers:
    if ray is not None:
        from .ray_cluster import RayCluster

        return RayCluster(output, ray, places[0].workers)
    return InProcess(output, places[0]) if is_here else Processes(output, places)


def _check_model(setting: BenchmarkSetting) -> None:
    """Find out once what every run would fail of."""
    weights = setting.model.weights
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"weights: no such file: {weights}")
    build_empty(setting.model, 2)


def _check_folder(output: Path) -> None:
    """Leave a folder of other things as it is."""
    if not output.is_dir() or (output / SETTING).is_file():
        return
    if any(path.name != LOCK for path in output.iterdir()):
        raise ValueError(f"output: {output} is not empty, and holds no benchmark")


def _write_failure(folder: Path, failure: Failure) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(failure), indent=2) + "\n"
    write_atomically(folder / FAILED, text.encode())
