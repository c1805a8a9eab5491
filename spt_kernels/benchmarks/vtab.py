"""VTAB-1k: nineteen tasks of 1,000 images, as lists of files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from ..finetuning import ImageSource
from ..finetuning.images.image_list import rows_of
from .choice import chosen, every
from .task import BenchmarkTask

LISTS = ("train800.txt", "val200.txt", "train800val200.txt", "test.txt")


class VtabTask(NamedTuple):
    """What is known of a task before its files are read."""

    title: str
    group: str
    num_classes: int


# In the order of the tables of the paper and of those before it; the names are those of the folders
# as NOAH (Zhang et al., 2022) shares them, which SSF, RepAdapter and SPT read as well.
VTAB: Mapping[str, VtabTask] = MappingProxyType(
    {
        "cifar": VtabTask("CIFAR-100", "Natural", 100),
        "caltech101": VtabTask("Caltech101", "Natural", 102),
        "dtd": VtabTask("DTD", "Natural", 47),
        "oxford_flowers102": VtabTask("Flowers102", "Natural", 102),
        "oxford_iiit_pet": VtabTask("Pets", "Natural", 37),
        "svhn": VtabTask("SVHN", "Natural", 10),
        "sun397": VtabTask("Sun397", "Natural", 397),
        "patch_camelyon": VtabTask("Patch Camelyon", "Specialized", 2),
        "eurosat": VtabTask("EuroSAT", "Specialized", 10),
        "resisc45": VtabTask("Resisc45", "Specialized", 45),
        "diabetic_retinopathy": VtabTask("Retinopathy", "Specialized", 5),
        "clevr_count": VtabTask("Clevr/count", "Structured", 8),
        "clevr_dist": VtabTask("Clevr/distance", "Structured", 6),
        "dmlab": VtabTask("DMLab", "Structured", 6),
        "kitti": VtabTask("KITTI/distance", "Structured", 4),
        "dsprites_loc": VtabTask("dSprites/location", "Structured", 16),
        "dsprites_ori": VtabTask("dSprites/orientation", "Structured", 16),
        "smallnorb_azi": VtabTask("SmallNORB/azimuth", "Structured", 18),
        "smallnorb_ele": VtabTask("SmallNORB/elevation", "Structured", 9),
    }
)


def vtab_tasks(
    root: str | os.PathLike[str], names: Sequence[str] = ()
) -> tuple[BenchmarkTask, ...]:
    """The tasks of VTAB-1k (Zhai et al., 2019) in the folder `root`.

    Options are chosen by training on 800 images and validating on 200. The run that is reported
    trains on all 1,000 and tests on the whole of the original test set.

    Args:
        root: holds a folder per task, called as in `VTAB`, with the lists `train800.txt`,
            `val200.txt`, `train800val200.txt` and `test.txt`. A line is a path below that folder
            and a label, as `images/train800/000000.jpg 3`.
        names: of tasks, for these alone.

    Raises:
        ValueError: a name is unknown; or folders or lists are missing, malformed or hold a label
            that the task does not have: all such at once.
    """

    def make(name: str) -> BenchmarkTask:
        folder, known = Path(root) / name, VTAB[name]
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        lacking = [file for file in LISTS if not (folder / file).is_file()]
        if lacking:
            raise ValueError(f"{folder}: lacks {', '.join(lacking)}")
        for file in LISTS:
            _check_labels(folder / file, known.num_classes)
        train, val, both, test = (str((folder / file).resolve()) for file in LISTS)
        choose = ImageSource(
            str(folder.resolve()),
            train_list=train,
            val_list=val,
            num_classes=known.num_classes,
            use_test=False,
        )
        final = replace(
            choose, train_list=both, val_list=None, test_list=test, val_share=0.0, use_test=True
        )
        return BenchmarkTask(name, known.title, known.group, choose, final)

    what = f"VTAB-1k: expected {root}/<task>/ with {', '.join(LISTS)}"
    return every(chosen(names, VTAB), make, what)


def _check_labels(file: Path, num_classes: int) -> None:
    for line, _, label in rows_of(file):
        if not label.isdecimal() or int(label) >= num_classes:
            raise ValueError(
                f"{file}, line {line}: expected a label from 0 to {num_classes - 1}, got {label!r}"
            )
