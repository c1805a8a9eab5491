"""A benchmark of one's own: groups of tasks, as folders of images or lists of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..finetuning import ImageSource
from .choice import chosen, every
from .task import BenchmarkTask

LISTS = ("train.txt", "val.txt", "test.txt")


def folder_tasks(
    root: str | os.PathLike[str], names: Sequence[str] = ()
) -> tuple[BenchmarkTask, ...]:
    """Tasks of one's own, as `root/<group>/<task>/`.

    A task is a folder with `train/`, `val/` and `test/`, each with a folder per class, or with the
    lists `train.txt`, `val.txt` and `test.txt` of `path label` lines, the paths below that folder;
    where there is a `train.txt`, the lists are read. Validation images may be missing: then options
    are chosen with a tenth of the training images held out. The run that is reported trains on the
    training and validation images together.

    Args:
        root: the folder of the groups.
        names: of tasks, for these alone.

    Raises:
        ValueError: a name is unknown, two groups have a task of one name, or there is no task; or
            tasks lack their training or test images: all such at once.
    """
    found = _tasks_in(Path(root))

    def make(name: str) -> BenchmarkTask:
        folder = found[name]
        place = str(folder.resolve())
        lists = [folder / file for file in LISTS]
        if lists[0].is_file():
            if not lists[2].is_file():
                raise ValueError(f"{folder}: has train.txt and no test.txt")
            train, val, test = (str(f.resolve()) if f.is_file() else None for f in lists)
            final = ImageSource(place, train, val, test, train_on_val=True)
        else:
            for split in ("train", "test"):
                if not (folder / split).is_dir():
                    raise ValueError(f"{folder}: has no {split}/ and no {split}.txt")
            final = ImageSource(place, train_on_val=True)
        choose = replace(final, test_list=None, use_test=False, train_on_val=False)
        return BenchmarkTask(name, name, folder.parent.name, choose, final)

    what = f"{root}: expected <group>/<task>/ with train/ and test/, or train.txt and test.txt"
    return every(chosen(names, found), make, what)


def _tasks_in(root: Path) -> dict[str, Path]:
    """The folder of each task, by its name."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    found: dict[str, Path] = {}
    if any((root / name).exists() for name in ("train", "train.txt")):
        raise ValueError(
            f"{root}: is one task; expected folders <group>/<task>/ with train/ and test/ in each, "
            "or tune on it with `spt-kernels finetune`"
        )
    for group in _folders(root):
        if (group / "train").is_dir() or (group / "train.txt").is_file():
            raise ValueError(
                f"{group}: is a task where a group was expected: put it into a folder of its group"
            )
        for task in _folders(group):
            if task.name in found:
                raise ValueError(f"{task}: the task {found[task.name]} has the same name")
            found[task.name] = task
    if not found:
        raise ValueError(f"{root}: expected folders <group>/<task>/, found none")
    return found


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
