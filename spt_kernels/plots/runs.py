"""Finished runs of several tasks, methods and seeds, read from their folders."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..benchmarks.cell import read_choice
from ..benchmarks.shared_sensitivity import SHARED
from ..finetuning.folder.run_folder import RunFolder
from ..finetuning.run.description import SEGMENTATION

# Of a method, what makes it another point of a table; what may be chosen for each task is not here
SETTINGS = ("budget", "rank", "samples", "rule")
CHOSEN = "chosen"  # in place of a value that is each task's own, by its validation images
_DEEP = 4  # folders down: a benchmark's are output/task/method/seed0
_SEED = re.compile(r"seed[-_]?\d+")


@dataclass(frozen=True)
class TaskRun:
    """One finished run.

    Attributes:
        path: its folder.
        task: what it was tuned for.
        method: its name.
        settings: of the method, what it trains by: the options in `SETTINGS`; `CHOSEN` stands for
            a value that a benchmark has chosen for each task.
        seed: of the run.
        test_accuracy: `None` without test images.
        val_accuracy: `None` without validation images.
        trained: parameters beside the head.
        structured: those in LoRA or Adapter modules; `None` without a plan.
        unstructured: those trained one by one; `None` without a plan.
        backbone: parameters of the model without its head.
        model: which one, built with what, and from which weights.
        measured_on: samples of its sensitivity: fewer than were asked for where there are no more
            training images.
    """

    path: str
    task: str
    method: str
    settings: Mapping[str, Any]
    seed: int
    test_accuracy: float | None
    val_accuracy: float | None
    trained: int
    structured: int | None
    unstructured: int | None
    backbone: int
    model: str
    measured_on: int


@dataclass(frozen=True)
class FoundRuns:
    """The runs in some folders.

    Attributes:
        runs: the finished ones, in the order of their folders.
        unfinished: folders of the others.
    """

    runs: tuple[TaskRun, ...]
    unfinished: tuple[str, ...]


def name_of(path: str | os.PathLike[str]) -> str:
    """What a run folder, or a file in it, is called: `cifar` of `cifar/spt-lora/seed0/…`.

    So is what a benchmark's runs share, `cifar/sensitivity/…`. A file with a name of its own, as
    `cifar.sensitivity`, is called by that.
    """
    folder = bare = Path(path).resolve()
    while bare.suffix in (".safetensors", ".sensitivity", ".plan"):
        bare = bare.with_suffix("")
    if bare != folder:
        if bare.name not in ("plan", "sensitivity"):
            return bare.name
        folder = bare.parent
    is_of_task = is_of_a_benchmark(folder) or folder.parent.name == SHARED
    return folder.parents[1].name if is_of_task else folder.name


def run_folders(path: str | os.PathLike[str]) -> list[Path]:
    """`path` itself where it is a run's folder, else all such in it.

    Passed over are hidden folders, and what lies beside folders of seeds.

    Raises:
        ValueError: no such folder.
    """
    if not Path(path).is_dir():
        raise ValueError(f"files: no such folder: {path}")
    return list(_found(Path(path), _DEEP))


def read_runs(paths: Iterable[str | os.PathLike[str]], methods: Collection[str] = ()) -> FoundRuns:
    """Read the finished runs in some folders.

    A run in `task/method/seed0/`, as a benchmark leaves it, is of that task. The task of any other
    is called as the folder of its images; other images under the same name get a number.

    Args:
        paths: folders of runs, or folders with such.
        methods: names of those to read; empty for all.

    Raises:
        ValueError: no such folder, a folder without a run, no finished run of such a method, or a
            damaged file.
    """
    folders = {folder.resolve(): folder for path in paths for folder in _some(path)}
    images: dict[str, list[str]] = {}  # by name, which ones there are
    runs, unfinished = [], []
    for folder in folders.values():
        config, result = RunFolder(folder).read_config(), RunFolder(folder).read_json("result")
        try:
            if config is None or (methods and config["job"]["method"]["name"] not in methods):
                continue
            if config.get("kind") == SEGMENTATION:
                raise ValueError(f"files: {folder} holds a run that labels pixels, not images")
            if result is None:
                unfinished.append(str(folder))
            else:
                runs.append(_run(folder, config["job"], result, images))
        except TypeError as error:
            raise ValueError(
                f"files: {folder} holds no run that can be read ({error!r})"
            ) from error
    if not runs:
        of = f" of method {', '.join(methods)}" if methods else ""
        left = f"; not finished: {', '.join(unfinished)}" if unfinished else ""
        raise ValueError(f"files: expected a finished run{of}, found none{left}")
    return FoundRuns(tuple(runs), tuple(unfinished))


def _run(
    folder: Path, job: Mapping[str, Any], result: Mapping[str, Any], images: dict[str, list[str]]
) -> TaskRun:
    method, choice = job["method"], read_choice(folder.resolve().parent)
    chosen = set() if choice is None else choice["chosen"].keys() & set(SETTINGS)
    return TaskRun(
        path=str(folder),
        task=_task(folder.resolve(), job["images"], images),
        method=result["method"],
        settings={name: method.get(name) for name in SETTINGS} | dict.fromkeys(chosen, CHOSEN),
        seed=job["recipe"]["seed"],
        test_accuracy=result["test_accuracy"],
        val_accuracy=result["val_accuracy"],
        trained=result["trained_parameters"],
        structured=result.get("structured_parameters"),
        unstructured=result.get("unstructured_parameters"),
        backbone=result["backbone_parameters"],
        model=_model(job["model"]),
        measured_on=_measured_on(job, result),
    )


def _measured_on(job: Mapping[str, Any], result: Mapping[str, Any]) -> int:
    samples: int = job["method"]["samples"]
    is_given = job.get("plan") is not None or job.get("sensitivity") is not None
    images = result.get("images")
    # of what was given the job tells; runs of older versions do not tell of their images
    if is_given or not isinstance(images, Mapping):
        return samples
    return min(samples, images.get("train", samples))


def _model(source: Mapping[str, Any]) -> str:
    args = ", ".join(f"{name}={value}" for name, value in sorted(source["args"].items()))
    name = f"{source['name']} ({args})" if args else source["name"]
    return " from ".join(filter(None, (name, source.get("weights"))))


def _task(folder: Path, source: Mapping[str, Any], images: dict[str, list[str]]) -> str:
    if is_of_a_benchmark(folder):
        return name_of(folder)
    name = Path(source["root"]).name
    seen = images.setdefault(name, [])
    own = json.dumps(source, sort_keys=True)
    if own not in seen:
        seen.append(own)
    place = seen.index(own)
    return f"{name} #{place + 1}" if place else name


def is_of_a_benchmark(folder: Path) -> bool:
    """Whether a folder lies as a benchmark's runs do, in `task/method/seed0`."""
    return bool(_SEED.fullmatch(folder.name)) and len(folder.parents) > 2


def _some(path: str | os.PathLike[str]) -> list[Path]:
    found = [folder for folder in run_folders(path) if RunFolder(folder)["config"].is_file()]
    if not found:
        raise ValueError(f"files: {path} holds no run (config.json is not there)")
    return found


def _found(path: Path, deep: int) -> Iterator[Path]:
    own = RunFolder(path)
    if any(own[name].is_file() for name in ("config", "plan", "sensitivity")):
        yield path
    elif deep:
        inside = [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]
        # beside a method's seeds are the runs that its options were chosen by
        seeds = [p for p in inside if is_of_a_benchmark(p)]
        for inner in sorted(seeds or inside, key=lambda entry: _in_order(entry.name)):
            yield from _found(inner, deep - 1)


def _in_order(name: str) -> list[Any]:
    """`seed2` before `seed10`."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]
