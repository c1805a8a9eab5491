"""FGVC: five fine-grained tasks, each as its authors share it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from ..finetuning import ImageSource
from ..finetuning.images.layouts import LAYOUTS
from .choice import chosen, every
from .task import BenchmarkTask

# How the folders are called, by the archives or by who shares them; in lower case.
FOLDERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cub-200-2011": ("cub_200_2011", "cub-200-2011", "cub200", "cub"),
        "nabirds": ("nabirds",),
        "oxford-flowers": ("oxfordflower", "oxford-flowers", "oxford_flowers", "flowers-102"),
        "stanford-dogs": ("stanford-dogs", "stanford_dogs", "stanforddogs", "dogs"),
        "stanford-cars": ("stanford-cars", "stanford_cars", "stanfordcars", "cars"),
    }
)


def fgvc_tasks(
    root: str | os.PathLike[str], names: Sequence[str] = ()
) -> tuple[BenchmarkTask, ...]:
    """The tasks of FGVC in the folder `root`, with the splits of VPT (Jia et al., ECCV 2022).

    Where its `train.json`, `val.json` and `test.json` are in a data set's folder, they decide. Else
    the data set's own files do: the validation images are its own (Oxford Flowers), or a tenth of
    each class of its training images, the same for every seed; a run says so. As in VPT and all who
    compare with it, the run that is reported trains on the same images that options are chosen
    with, the validation images aside, and tests on the data set's own test images.

    Args:
        root: holds a folder per data set, called as in `FOLDERS`, in upper or lower case.
        names: of tasks, for these alone.

    Raises:
        ValueError: a name is unknown; or folders or files are missing or malformed: all such at
            once. Images are looked for when a task is read.
    """

    def make(name: str) -> BenchmarkTask:
        folder, layout = _folder(Path(root), name), LAYOUTS[name]
        layout.listing(folder)
        final = ImageSource(str(folder.resolve()), layout=name)
        choose = replace(final, use_test=False)
        return BenchmarkTask(name, layout.title, "FGVC", choose, final)

    what = f"FGVC: expected a folder for each data set in {root}"
    return every(chosen(names, FOLDERS), make, what)


def _folder(root: Path, name: str) -> Path:
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    found = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    for own in FOLDERS[name]:
        if own in found:
            return found[own]
    raise ValueError(f"{root}: no folder called {' or '.join(FOLDERS[name])}")
