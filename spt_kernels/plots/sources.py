"""Which plans and sensitivities some files and folders hold, by task and by group of tasks."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..benchmarks.shared_sensitivity import stored_for
from ..finetuning.base.weight_file import own_kind
from ..finetuning.folder.run_folder import FILES, RunFolder
from ..methods.method import entry_of
from ..plan import Plan
from ..sensitivity import Sensitivity
from .runs import is_of_a_benchmark, name_of, run_folders
from .selection import selection

T = TypeVar("T")
_ENDINGS = (".plan", ".sensitivity", ".safetensors")


@dataclass(frozen=True)
class TaskFiles:
    """The files that a picture is made of.

    Attributes:
        groups: name -> task -> its plan or sensitivity. A folder of several tasks is a group of its
            own, called as the folder; files and folders of single tasks are one without a name.
        notes: what was passed over, and why.
    """

    groups: Mapping[str, Mapping[str, Path]]
    notes: tuple[str, ...]


def task_files(
    paths: Iterable[str | os.PathLike[str]],
    kind: str = "plan",
    *,
    labels: Sequence[str] = (),
    methods: Collection[str] = (),
) -> TaskFiles:
    """Find the file of each task.

    A file or folder of a run is of the task that `name_of` names. Where a folder of several tasks
    has several runs of one, the first with such a file stands for it, and a note says so.

    Args:
        paths: files of plans or sensitivities, folders of runs, or folders of such.
        kind: `plan` or `sensitivity`: which file is taken of a run's folder.
        labels: names for the groups where there are such, else for the tasks, in the order given.
        methods: in folders, only runs of these; without any, of all that choose by a sensitivity,
            this package's first.

    Raises:
        ValueError: a file or folder that is not there or holds none of the kind, single tasks
            beside folders of several, two that are called alike, or too few or too many labels.
    """
    singles: list[tuple[str, Path]] = []
    groups: list[tuple[str, dict[str, Path]]] = []
    notes: list[str] = []
    for path in map(Path, paths):
        if path.is_file():
            if own_kind(path) not in ("plan", "sensitivity"):
                raise ValueError(f"files: {path} is neither a plan nor a sensitivity")
            singles.append((name_of(path), path))
        elif path.is_dir() and run_folders(path) == [path]:
            singles.append((name_of(path), _file_in(path, kind)))
        else:
            groups.append((name_of(path), _tasks_in(path, kind, methods, notes)))
    if not singles and not groups:
        raise ValueError("files: expected at least one, got none")
    if singles and groups:
        raise ValueError(
            f"files: expected files of single tasks, or folders of several, got both: "
            f"{singles[0][1]} and the tasks in {groups[0][0]}"
        )
    if singles:
        return TaskFiles({"": _called(singles, labels)}, ())
    return TaskFiles(_called(groups, labels), tuple(notes))


def load_selection(path: str | os.PathLike[str], budget: int | float | None = None) -> Plan:
    """Read a plan, or what a sensitivity selects; as `selection`, and `DeltaFormatError`."""
    source = Plan.load(path) if own_kind(path) == "plan" else Sensitivity.load(path)
    try:
        return selection(source, budget)
    except ValueError as error:
        raise ValueError(f"{error} ({os.fspath(path)})") from error


def _tasks_in(path: Path, kind: str, methods: Collection[str], notes: list[str]) -> dict[str, Path]:
    found: dict[str, list[tuple[tuple[bool, bool], Path, Path]]] = {}
    for folder in run_folders(path):
        config = RunFolder(folder).read_config()
        method = None if config is None else config["job"]["method"]["name"]
        chosen = method is None or (method in methods if methods else _is_aware(method))
        file = _kept(folder, kind) if chosen else None
        if file is not None:
            # this package's first, and what no run in the folder is of last
            place = (method is not None and not method.startswith("spt-"), method is None)
            found.setdefault(name_of(folder), []).append((place, folder, file))
    if not found and (loose := _loose_files(path, kind)):
        return loose
    if not found:
        of = f" of method {', '.join(methods)}" if methods else ""
        raise ValueError(f"files: {path} holds no {FILES[kind]}{of}, and no other {kind}")
    shown: dict[str, Path] = {}
    for task, each in found.items():
        _, folder, shown[task] = min(each, key=lambda one: one[0])
        if (count := len({file for _, _, file in each})) > 1:
            notes.append(f"{task}: {folder} is shown, of {count} that have one")
    return shown


def _is_aware(method: str) -> bool:
    """Whether runs of a method choose by a sensitivity; one that is not known here may do so."""
    try:
        return "samples" in entry_of(method).options
    except ValueError:
        return True


def _loose_files(path: Path, kind: str) -> dict[str, Path]:
    """Files of a kind in a folder that have names of their own, as `cifar.plan`; or the others."""
    files = sorted(file for file in path.iterdir() if file.suffix in _ENDINGS)
    kinds = {file: own_kind(file) for file in files if file.is_file()}
    is_there = kind in kinds.values()
    wanted = {kind} if is_there else {"plan", "sensitivity"}
    return {name_of(file): file for file, own in kinds.items() if own in wanted}


def _file_in(folder: Path, kind: str) -> Path:
    file = _kept(folder, kind)
    if file is None:
        raise ValueError(f"files: {folder} holds no {FILES[kind]}")
    return file


def _kept(folder: Path, kind: str) -> Path | None:
    """The file of a run; what a benchmark's was measured by lies beside the methods of its task."""
    own = RunFolder(folder)
    if own[kind].is_file():
        return own[kind]
    config = own.read_config() if kind == "sensitivity" else None
    if config is None or not is_of_a_benchmark(folder.resolve()):
        return None
    job = config["job"]
    if "images" not in job or not _is_aware(
        job["method"]["name"]
    ):  # of `segment`; measures nothing
        return None
    shared = stored_for(job, folder.resolve().parents[1])[kind]
    return shared if shared.is_file() else None


def _called(named: Sequence[tuple[str, T]], labels: Sequence[str]) -> dict[str, T]:
    """What is named, by the labels if there are any; each name once."""
    if labels and len(labels) != len(named):
        raise ValueError(f"label: expected one for each of the {len(named)}, got {len(labels)}")
    names = list(labels) or [name for name, _ in named]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"label: two are called {twice[0]!r}; give each a name, in the order of the files"
        )
    return dict(zip(names, (what for _, what in named), strict=True))
