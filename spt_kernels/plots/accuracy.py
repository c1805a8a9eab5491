"""Accuracy by method and setting: its mean over tasks, and its standard error over seeds."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..benchmarks.vtab import VTAB
from ..finetuning.results.standard_error import standard_error
from ..methods.method import METHODS, entry_of
from .numbers import Numbers
from .runs import CHOSEN, SETTINGS, TaskRun

_OURS = tuple(name for name, entry in METHODS.items() if entry.home == "spt")


@dataclass(frozen=True)
class AccuracyRow:
    """One method in one setting, on all tasks.

    Attributes:
        method: its name.
        settings: what it trains by, as `TaskRun.settings`.
        trained: parameters beside the head, mean over the runs.
        structured: those in modules, likewise; `None` where a run has no plan.
        unstructured: those trained one by one, likewise.
        tasks: task -> accuracy, mean over the seeds, 0 to 1.
        seeds: seed -> accuracy, mean over the tasks.
    """

    method: str
    settings: Mapping[str, Any]
    trained: float
    structured: float | None
    unstructured: float | None
    tasks: Mapping[str, float]
    seeds: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Over tasks and seeds."""
        return statistics.fmean(self.seeds.values())

    @property
    def standard_error(self) -> float | None:
        """Of the mean, over the seeds; `None` of a single one."""
        return standard_error(self.seeds.values())

    @property
    def family(self) -> str:
        """The method as `METHODS` names it: `lora-K` of `lora-8`."""
        return re.sub(r"-\d+$", "-K", self.method)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The settings that are each task's own."""
        return tuple(name for name, value in self.settings.items() if value == CHOSEN)

    def row(self) -> dict[str, Any]:
        """As a row of a table."""
        return {
            "method": self.method,
            **self.settings,
            "trained_parameters": self.trained,
            "structured_parameters": self.structured,
            "unstructured_parameters": self.unstructured,
            "accuracy": self.mean,
            "standard_error": self.standard_error,
            "seeds": len(self.seeds),
            **{f"accuracy of {task}": accuracy for task, accuracy in self.tasks.items()},
        }


@dataclass(frozen=True)
class AccuracyTable(Numbers):
    """Accuracies that can be compared: each row is of the same tasks.

    Attributes:
        each: the rows.
        tasks: what each accuracy is a mean over.
        images: `test` or `validation`: which ones the accuracies are of.
        backbone: parameters of the model without its head.
        missing: why a seed of a row, or a row, is left out.
    """

    each: tuple[AccuracyRow, ...]
    tasks: tuple[str, ...]
    images: str
    backbone: int
    missing: tuple[str, ...] = field(default=())

    def rows(self) -> list[dict[str, Any]]:
        """A row per method and setting."""
        return [row.row() for row in self.each]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "tasks": list(self.tasks),
            "images": self.images,
            "backbone_parameters": self.backbone,
            "missing": list(self.missing),
            "rows": self.rows(),
        }


def accuracy_by_budget(
    runs: Iterable[TaskRun], groups: Mapping[str, str] | None = None
) -> AccuracyTable:
    """Accuracy of every method in each of its sizes: the paper's Figure 3a.

    A row is the runs of one method and setting (budget, rank, samples, rule); other options, as a
    learning rate that was chosen for each task, may differ. So may a budget or a rank that was
    chosen: the row is then of what was best on each task's validation images.

    Args:
        runs: of one model, as `read_runs` gives them.
        groups: task -> group, where the mean over tasks is to be that of the groups' means. Without
            it, that is so of all tasks of VTAB-1k, and any other tasks count alike.

    Raises:
        ValueError: no runs, runs of different models, two of the same task, seed and setting, a
            task without a group, or no setting that has a run on every task.
    """
    return _table(list(runs), groups or {})


def structure_ablation(
    runs: Iterable[TaskRun], groups: Mapping[str, str] | None = None
) -> AccuracyTable:
    """With and without structured and unstructured tuning: the paper's Table 6.

    Args:
        runs: of sensitivity-aware methods, as `spt-lora`, `spt-lora-structured` and
            `spt-unstructured`; those of others are passed over.
        groups: as `accuracy_by_budget` has them.

    Raises:
        ValueError: as `accuracy_by_budget`, or no two such methods.
    """
    aware = [run for run in runs if run.method in _OURS]
    if len({run.method for run in aware}) < 2:
        raise ValueError(
            f"files: expected runs of two or more of {_listed(_OURS)}, got "
            f"{_listed(run.method for run in aware)}"
        )
    return _table(aware, groups or {})


def samples_ablation(
    runs: Iterable[TaskRun], groups: Mapping[str, str] | None = None
) -> AccuracyTable:
    """Accuracy against C, the samples that sensitivities are measured on: the paper's Table 8.

    C is as many as were asked for, or where all tasks have fewer training images, and as many each,
    what there was.

    Args:
        runs: of sensitivity-aware methods; those of others are passed over.
        groups: as `accuracy_by_budget` has them.

    Raises:
        ValueError: as `accuracy_by_budget`, or sensitivities on one number of samples alone.
    """
    aware = [run for run in runs if "samples" in entry_of(run.method).options]
    aware = [_as_measured(run, aware) for run in aware]
    if len(counts := {run.settings["samples"] for run in aware}) < 2:
        raise ValueError(
            "files: expected runs whose sensitivities were measured on two or more numbers of "
            f"samples, got {_listed(counts)}"
        )
    made = _table(aware, groups or {})
    return replace(made, each=tuple(sorted(made.each, key=lambda row: row.settings["samples"])))


def _as_measured(run: TaskRun, runs: Sequence[TaskRun]) -> TaskRun:
    """The run with the samples of its sensitivity, if all that ask for as many had as many."""
    asked = run.settings["samples"]
    found = {other.measured_on for other in runs if other.settings["samples"] == asked}
    return (
        run
        if len(found) > 1
        else replace(run, settings={**run.settings, "samples": run.measured_on})
    )


def labels(rows: Sequence[AccuracyRow], *, but: Sequence[str] = ()) -> list[str]:
    """The method of each row, and what tells it from others of that method.

    Args:
        rows: the rows.
        but: settings that are shown otherwise.
    """
    named = []
    for row in rows:
        alike = [other for other in rows if other.method == row.method]
        named.append(", ".join([row.method, *telling(row, alike, but)]))
    return named


def telling(row: AccuracyRow, alike: Sequence[AccuracyRow], but: Sequence[str] = ()) -> list[str]:
    """As `rank 4`: the settings in which `alike` differ, `but` some, and those that were chosen."""
    return [
        f"{name} {_told(value)}"
        for name, value in row.settings.items()
        if name in row.chosen
        or (name not in but and len({json.dumps(other.settings[name]) for other in alike}) > 1)
    ]


def _table(runs: Sequence[TaskRun], groups: Mapping[str, str]) -> AccuracyTable:
    if not runs:
        raise ValueError("files: expected at least one run, got none")
    if len(models := {run.model for run in runs}) > 1:
        raise ValueError(f"files: expected runs of one model, got {_listed(models)}")
    images = "test" if any(run.test_accuracy is not None for run in runs) else "validation"
    grouped: dict[str, list[TaskRun]] = {}
    for run in runs:
        key = json.dumps([run.method, *(run.settings[name] for name in SETTINGS)])
        grouped.setdefault(key, []).append(run)
    tasks = tuple(dict.fromkeys(run.task for run in runs))
    if not groups and set(tasks) == set(VTAB):
        groups = {task: VTAB[task].group for task in tasks}
    if groups and (without := [task for task in tasks if task not in groups]):
        raise ValueError(f"groups: expected one for every task, got none for {_listed(without)}")
    rows, missing = [], []
    for group in grouped.values():
        row, reasons = _row(group, tasks, images, groups)
        rows += [row] * (row is not None)
        missing += reasons
    if not rows:
        raise ValueError(f"files: no method has a run on every task: {'; '.join(missing)}")
    places = {name: place for place, name in enumerate(METHODS)}
    each = sorted(
        (row for row in rows if row is not None),
        key=lambda row: (places.get(row.family, len(places)), row.trained),
    )
    return AccuracyTable(tuple(each), tasks, images, runs[0].backbone, tuple(missing))


def _row(
    group: Sequence[TaskRun], tasks: Sequence[str], images: str, groups: Mapping[str, str]
) -> tuple[AccuracyRow | None, list[str]]:
    """The row of all complete seeds, `None` without any, and what is missing in the others."""
    found: dict[int, dict[str, TaskRun]] = {}
    for run in group:
        other = found.setdefault(run.seed, {}).setdefault(run.task, run)
        if other is not run:
            raise ValueError(
                f"files: two runs of {run.method} on {run.task} with seed {run.seed}: {other.path} "
                f"and {run.path}; leave one out"
            )
    method, missing = group[0].method, []
    seeds: dict[int, dict[str, float]] = {}
    for seed, by_task in sorted(found.items()):
        seen = {task: _accuracy(run, images) for task, run in by_task.items()}
        lacking = [task for task in tasks if seen.get(task) is None]
        if lacking:
            what = f"no {images} accuracy of {', '.join(lacking)}"
            missing.append(f"{method}, seed {seed}, is left out: {what}")
        else:
            seeds[seed] = {task: value for task in tasks if (value := seen[task]) is not None}
    if not seeds:
        return None, missing
    kept = [run for seed in seeds for run in found[seed].values()]
    return (
        AccuracyRow(
            method=method,
            settings=group[0].settings,
            trained=statistics.fmean(run.trained for run in kept),
            structured=_mean([run.structured for run in kept]),
            unstructured=_mean([run.unstructured for run in kept]),
            tasks={t: statistics.fmean(own[t] for own in seeds.values()) for t in tasks},
            seeds={seed: _over_tasks(own, groups) for seed, own in seeds.items()},
        ),
        missing,
    )


def _over_tasks(accuracies: Mapping[str, float], groups: Mapping[str, str]) -> float:
    """The mean of the groups' means."""
    grouped: dict[str, list[float]] = {}
    for task, accuracy in accuracies.items():
        grouped.setdefault(groups.get(task, ""), []).append(accuracy)
    return statistics.fmean(map(statistics.fmean, grouped.values()))


def _accuracy(run: TaskRun, images: str) -> float | None:
    return run.test_accuracy if images == "test" else run.val_accuracy


def _mean(values: Sequence[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _told(value: Any) -> str:
    if value is None:
        return "by default"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(map(str, sorted(values, key=str)))) or "none"
