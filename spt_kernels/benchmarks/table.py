"""The table of a benchmark: accuracy of each method on each task, over groups, and over all."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.json_file import read_object
from ..files.json_kinds import TEXT, checked
from ..finetuning.results.standard_error import standard_error
from .cell import Cell, CellResult
from .piece import Piece, cells_of, read_setting
from .setting import BenchmarkSetting
from .task import BenchmarkTask

FAILED = "failed.json"  # in the folder of a cell that could not be run


@dataclass(frozen=True)
class Figure:
    """An accuracy in 0 to 1, over seeds.

    Attributes:
        by_seed: seed -> accuracy, of the seeds that are there.
        n_seeds: how many there are to be.
    """

    by_seed: Mapping[int, float]
    n_seeds: int

    @property
    def mean(self) -> float | None:
        """Over the seeds that are there; `None` without any."""
        return statistics.fmean(self.by_seed.values()) if self.by_seed else None

    @property
    def standard_error(self) -> float | None:
        """Of the mean, over the seeds that are there; `None` of a single one."""
        return standard_error(self.by_seed.values())

    @property
    def is_complete(self) -> bool:
        """Whether all seeds are there."""
        return len(self.by_seed) == self.n_seeds

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "mean": self.mean,
            "standard_error": self.standard_error,
            "by_seed": {str(seed): value for seed, value in self.by_seed.items()},
            "is_complete": self.is_complete,
        }


@dataclass(frozen=True)
class BenchmarkRow:
    """What one method reached.

    Attributes:
        method: its name.
        trained_parameters: beside the head, mean over the runs; `None` without any.
        trained_share: of the backbone, likewise.
        tasks: name of a task -> its accuracy.
        groups: group -> mean over its tasks, for the seeds that all of them have: a mean over some
            of the tasks would be of another group, and is not there.
        mean: mean of the group means, likewise: each group counts the same, however many its tasks.
        chosen: task -> the options that were best on the validation images.
    """

    method: str
    trained_parameters: int | None
    trained_share: float | None
    tasks: Mapping[str, Figure]
    groups: Mapping[str, Figure]
    mean: Figure
    chosen: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class BenchmarkTable:
    """All that a benchmark's folder holds, finished or not.

    Attributes:
        suite: what the tasks are together.
        model: name of the base model.
        tasks: in the order of the table.
        seeds: of each method and task.
        rows: one for each method.
        failed: name of a cell, as `caltech101, spt-lora, seed 0` -> why it failed.
        n_missing: cells that have no result, failed ones included.
        seconds: that all runs took together.
        machines: every device, threads and versions that runs were computed with.
    """

    suite: str
    model: str
    tasks: tuple[BenchmarkTask, ...]
    seeds: tuple[int, ...]
    rows: tuple[BenchmarkRow, ...]
    failed: Mapping[str, str]
    n_missing: int
    seconds: float
    machines: tuple[str, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """In the order of the tasks."""
        return tuple(dict.fromkeys(task.group for task in self.tasks))

    def tasks_of(self, group: str) -> tuple[BenchmarkTask, ...]:
        """The tasks of a group."""
        return tuple(task for task in self.tasks if task.group == group)

    @property
    def n_runs(self) -> int:
        """Cells, finished or not."""
        return len(self.rows) * len(self.tasks) * len(self.seeds)

    def failed_of(self, setting: BenchmarkSetting) -> dict[str, str]:
        """Of the cells that failed, those that `setting` has; the folder may be of more."""
        own = {Piece(cell).name for cell in cells_of(setting)}
        return {name: reason for name, reason in self.failed.items() if name in own}

    @property
    def figures(self) -> list[Figure]:
        """Every accuracy in the table."""
        return [f for r in self.rows for f in (*r.tasks.values(), *r.groups.values(), r.mean)]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "suite": self.suite,
            "model": self.model,
            "seeds": list(self.seeds),
            "groups": {g: [task.name for task in self.tasks_of(g)] for g in self.groups},
            "rows": [
                {
                    "method": row.method,
                    "trained_parameters": row.trained_parameters,
                    "trained_share": row.trained_share,
                    "tasks": {name: figure.to_json() for name, figure in row.tasks.items()},
                    "groups": {name: figure.to_json() for name, figure in row.groups.items()},
                    "mean": row.mean.to_json(),
                    "chosen": {name: dict(options) for name, options in row.chosen.items()},
                }
                for row in self.rows
            ],
            "failed": dict(self.failed),
            "n_missing": self.n_missing,
            "seconds": round(self.seconds, 1),
            "machines": list(self.machines),
        }


def benchmark_table(output: str | os.PathLike[str]) -> BenchmarkTable:
    """Read the table of the benchmark in the folder `output`, as far as it has come.

    Raises:
        ValueError: there is none, or a file of it is damaged.
    """
    output = Path(output)
    setting = read_setting(output)
    cells = cells_of(setting)
    results = {c: done for c in cells if (done := CellResult.read(output, c)) is not None}
    failed = {}
    for cell in cells:
        path = output / cell.folder / FAILED
        if cell not in results and path.is_file():
            failed[Piece(cell).name] = checked(read_object(path), {"reason": TEXT})["reason"]
    return BenchmarkTable(
        setting.suite,
        setting.model.name,
        setting.tasks,
        setting.seeds,
        tuple(_row(setting, method.name, results) for method in setting.methods),
        failed,
        len(cells) - len(results),
        sum(result.seconds for result in results.values()),
        tuple(dict.fromkeys(map(_machine, results.values()))),
    )


def _row(
    setting: BenchmarkSetting, method: str, results: Mapping[Cell, CellResult]
) -> BenchmarkRow:
    own = {cell: result for cell, result in results.items() if cell.method == method}
    seeds = setting.seeds
    tasks = {
        task.name: Figure(
            {
                seed: own[cell].test_accuracy
                for seed in seeds
                if (cell := Cell(task.name, method, seed)) in own
            },
            len(seeds),
        )
        for task in setting.tasks
    }
    names = dict.fromkeys(task.group for task in setting.tasks)
    groups = {
        group: mean_of((tasks[task.name] for task in setting.tasks if task.group == group), seeds)
        for group in names
    }
    trained = [result.trained_parameters for result in own.values()]
    shares = [result.trained_share for result in own.values()]
    return BenchmarkRow(
        method,
        round(statistics.fmean(trained)) if trained else None,
        statistics.fmean(shares) if shares else None,
        tasks,
        groups,
        mean_of(groups.values(), seeds),
        {cell.task: result.chosen for cell, result in own.items() if result.chosen},
    )


def mean_of(figures: Iterable[Figure], seeds: Sequence[int]) -> Figure:
    """The mean of several accuracies, seed by seed, of the seeds that all of them have."""
    every = list(figures)
    common = [seed for seed in seeds if all(seed in figure.by_seed for figure in every)]
    means = {s: statistics.fmean(figure.by_seed[s] for figure in every) for s in common}
    return Figure(means, len(seeds))


def _machine(result: CellResult) -> str:
    threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
    where = result.device if result.device != "cpu" else f"{threads} of a CPU"
    return ", ".join([where, *(f"{name} {version}" for name, version in result.versions.items())])
