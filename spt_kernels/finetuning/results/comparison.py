"""Several finished runs side by side: what each way trained, reached and cost."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..folder.run_folder import FILES, RunFolder
from ..job.job import Key, flat
from ..job.recipe import HOW_IT_FITS, Recipe
from ..run.description import SEGMENTATION
from .standard_error import standard_error

# What a run of an older version, whose recipe lacks a field, was trained by
_RECIPE = {field.name: field.default for field in fields(Recipe)}
_DEEP = 4  # folders down: a benchmark's are output/task/method/seed0
_CANDIDATES = "choice"  # of a benchmark: runs by which options were chosen, beside choice.json
# Of a recipe, what makes no way better
_OF_NO_EFFECT = ("seed", "preset", "val_every", *HOW_IT_FITS)


@dataclass(frozen=True)
class ComparedWay:
    """The runs that differ in nothing but their seed.

    Attributes:
        name: the method, and beyond that what tells it from other rows of the same method.
        method: its name.
        runs: the folders.
        trained_parameters: beside the head.
        trained_share: of the backbone.
        file_bytes: of the task file, or whatever a run hands over; the largest.
        accuracies: one per run, as the comparison says of which images.
        seconds: of a run, mean.
        peak_bytes: of a training step, the largest.
    """

    name: str
    method: str
    runs: tuple[str, ...]
    trained_parameters: int
    trained_share: float
    file_bytes: int
    accuracies: tuple[float, ...]
    seconds: float
    peak_bytes: int

    @property
    def mean(self) -> float | None:
        """Mean accuracy, `None` where there is none."""
        return statistics.fmean(self.accuracies) if self.accuracies else None

    @property
    def standard_error(self) -> float | None:
        """Of the mean, over the runs; `None` of a single one."""
        return standard_error(self.accuracies)


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        ways: in the order in which they were named.
        images: `test` or `validation`: which ones the accuracies are of.
        peak: `measured` on a card, or `accounted`.
        unlike: what is not the same in all runs though accuracies hang on it, with its values.
        missing: why a folder is left out.
    """

    ways: tuple[ComparedWay, ...]
    images: str
    peak: str
    unlike: Mapping[str, tuple[str, ...]]
    missing: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        ways = [
            asdict(way) | {"mean_accuracy": way.mean, "standard_error": way.standard_error}
            for way in self.ways
        ]
        value: dict[str, Any] = json.loads(json.dumps(asdict(self) | {"ways": ways}))
        return value


def compare_runs(folders: Iterable[str | os.PathLike[str]]) -> Comparison:
    """Compare finished runs; those that differ in their seed alone are one row.

    Args:
        folders: of runs, or folders with such in them, up to four folders down; not those by which
            a benchmark has chosen options.

    Raises:
        ValueError: a folder is not there or has no run, or none is finished.
    """
    runs: list[tuple[RunFolder, dict[str, Any], dict[str, Any]]] = []
    missing: dict[str, str] = {}
    seen: dict[str, str] = {}  # a run's job, seed and all, and its folder
    for folder in _run_folders(folders):
        config, result = folder.read_config(), folder.read_json("result")
        assert config is not None
        if result is None:
            missing[str(folder.path)] = "it is not finished"
        elif config.get("kind") == SEGMENTATION:
            missing[str(folder.path)] = "it labels pixels"
        elif (other := seen.setdefault(_key(config["job"]), str(folder.path))) != str(folder.path):
            missing[str(folder.path)] = f"it is of the same job and seed as {other}"
        else:
            runs.append((folder, config["job"], result))
    if not runs:
        why = [n if "finished" in reason else f"{n} ({reason})" for n, reason in missing.items()]
        raise ValueError(f"runs: none is finished: {', '.join(why)}")
    of_test = [result["test_accuracy"] is not None for _, _, result in runs]
    images = "test" if any(of_test) else "validation"
    is_measured = all(result.get("measured_peak_bytes") is not None for _, _, result in runs)
    peak = "measured" if is_measured else "accounted"
    grouped: dict[str, list[tuple[RunFolder, dict[str, Any], dict[str, Any]]]] = {}
    for run in runs:
        grouped.setdefault(_key(_without_seed(run[1])), []).append(run)
    names = _names([_without_seed(group[0][1]) for group in grouped.values()])
    ways = tuple(
        _way(name, group, images.removesuffix("idation"), peak)
        for name, group in zip(names, grouped.values(), strict=True)
    )
    return Comparison(ways, images, peak, _unlike([job for _, job, _ in runs]), missing)


def _run_folders(folders: Iterable[str | os.PathLike[str]]) -> list[RunFolder]:
    found: dict[Path, RunFolder] = {}
    for path in map(Path, folders):
        if not path.is_dir():
            raise ValueError(f"runs: no such folder: {path}")
        own = list(_runs_in(path, _DEEP))
        if not own:
            raise ValueError(
                f"runs: {path} holds no run ({FILES['config']} is not there, or another's)"
            )
        found |= {folder.path.resolve(): folder for folder in own}
    if not found:
        raise ValueError("runs: expected at least one folder, got none")
    return list(found.values())


def _runs_in(path: Path, deep: int) -> Iterator[RunFolder]:
    """The folder itself where it is a run's, else all such in it."""
    own = RunFolder(path)
    if own.read_config() is not None:
        yield own
    elif deep:
        with os.scandir(path) as entries:
            inside = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
        for name in inside:
            if name != _CANDIDATES or not path.joinpath(f"{name}.json").is_file():
                yield from _runs_in(path / name, deep - 1)


def _way(
    name: str, group: Sequence[tuple[RunFolder, Any, dict[str, Any]]], images: str, peak: str
) -> ComparedWay:
    results = [result for _, _, result in group]
    seen = [result[f"{images}_accuracy"] for result in results]
    first = results[0]
    return ComparedWay(
        name=name,
        method=first["method"],
        runs=tuple(str(folder.path) for folder, _, _ in group),
        trained_parameters=first["trained_parameters"],
        trained_share=first["trained_parameters"] / first["backbone_parameters"],
        file_bytes=max(result["task_bytes"] for result in results),
        accuracies=tuple(accuracy for accuracy in seen if accuracy is not None),
        seconds=statistics.fmean(result["seconds"] for result in results),
        peak_bytes=max(result[f"{peak}_peak_bytes"] for result in results),
    )


def _key(job: Mapping[str, Any]) -> str:
    return json.dumps(job, sort_keys=True)


def _without_seed(job: Mapping[str, Any]) -> dict[str, Any]:
    return {**job, "recipe": {**job["recipe"], "seed": None}}


def _names(jobs: Sequence[dict[str, Any]]) -> list[str]:
    """The method of each, and what tells it from others of that method."""
    every = [flat(job) for job in jobs]
    telling = _telling(jobs)
    names = []
    for own in every:
        method = own["method", "name"]
        parts = (f"{key[-1]} {_told(own.get(key))}" for key in telling[method])
        names.append(", ".join([method, *parts]))
    return names


def _telling(jobs: Iterable[Mapping[str, Any]]) -> dict[str, list[Key]]:
    """Method -> in what its jobs differ."""
    alike: dict[str, list[dict[Key, Any]]] = {}
    for job in jobs:
        alike.setdefault(job["method"]["name"], []).append(flat(job))
    keys = {method: sorted({key for job in own for key in job}) for method, own in alike.items()}
    return {
        method: [key for key in keys[method] if len({json.dumps(v.get(key)) for v in own}) > 1]
        for method, own in alike.items()
    }


def _unlike(jobs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """What ways are compared on: the base model, the images, and how long and how all train.

    Of how they train, what the name of every row says is not told again.
    """
    shared = [{name: job[name] for name in ("model", "images", "form")} for job in jobs]
    trained = [{**_RECIPE, **job["recipe"]} for job in jobs]
    every = [flat({**own, "recipe": how}) for own, how in zip(shared, trained, strict=True)]
    in_names = set.intersection(*(set(keys) for keys in _telling(jobs).values()))
    keys = [
        key
        for key in dict.fromkeys(key for values in every for key in values)
        if key[0] != "recipe" or (key[1] not in _OF_NO_EFFECT and key not in in_names)
    ]
    values = {key: dict.fromkeys(_told(job.get(key)) for job in every) for key in keys}
    return {".".join(key): tuple(seen) for key, seen in values.items() if len(seen) > 1}


def _told(value: Any) -> str:
    if value is None:
        return "by default"
    if isinstance(value, list):
        return ",".join(map(str, value)) or "all"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
