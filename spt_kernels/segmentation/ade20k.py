"""Images with a label for every pixel, in the layout in which ADE20K is published."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..finetuning.images.labelled import SUFFIXES

IGNORED = 255  # of a pixel that has no class
_NUM_CLASSES = 150
NAMES = "objectInfo150.txt"
_MOST_CLASSES = 255  # a label map has eight bits, and one value means none


@dataclass(frozen=True)
class LabelledScenes:
    """Image files, each with a file of its pixels' classes.

    Attributes:
        paths: the images, by name.
        annotations: for each its label map, a PNG: 0 for none, else 1 more than the class.
        classes: their names.
    """

    paths: tuple[Path, ...]
    annotations: tuple[Path, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, numbers: Sequence[int]) -> LabelledScenes:
        """Those with these numbers."""
        paths, annotations = (
            tuple(files[n] for n in numbers) for files in (self.paths, self.annotations)
        )
        return LabelledScenes(paths, annotations, self.classes)


def hold_out(
    scenes: LabelledScenes, share: float, seed: int
) -> tuple[LabelledScenes, LabelledScenes | None]:
    """The scenes to train on, and a share of them to choose by, which are not; `None` of 0.

    Raises:
        ValueError: there are too few for both.
    """
    if share == 0:
        return scenes, None
    wanted = max(1, round(share * len(scenes)))
    if wanted >= len(scenes):
        raise ValueError(
            f"val_share: {share} of {len(scenes)} training images leaves none to train on"
        )
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(seed)).tolist()
    return scenes.take(sorted(order[wanted:])), scenes.take(sorted(order[:wanted]))


def read_ade20k(root: str | os.PathLike[str], split: str) -> LabelledScenes:
    """Find the images of one split, `images/<split>/` and `annotations/<split>/`.

    The classes are those that `objectInfo150.txt` lists, in its order, each by the first of its
    names; without that file they are the 150 of the challenge, by number.

    Args:
        root: `ADEChallengeData2016`, or a folder like it.
        split: `"training"` or `"validation"`.

    Raises:
        ValueError: a folder is missing or empty, or an image has no label map or that of another,
            or the list of classes cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"data: no such folder: {root}")
    images, maps = root / "images" / split, root / "annotations" / split
    for folder in (images, maps):
        if not folder.is_dir():
            raise ValueError(
                f"data: expected images/{split} and annotations/{split} in {root}, as ADE20K has "
                f"them; there is no {folder.relative_to(root)}"
            )
    paths = sorted(p for p in images.iterdir() if _is_image(p))
    if not paths:
        raise ValueError(f"data: no images in {images}")
    by_stem: dict[str, Path] = {}
    for path in paths:
        if (other := by_stem.setdefault(path.stem, path)) != path:
            raise ValueError(f"data: {other.name} and {path.name} have one label map, in {maps}")
    annotations = [maps / f"{path.stem}.png" for path in paths]
    lacking = [path for path, own in zip(paths, annotations, strict=True) if not own.is_file()]
    if lacking:
        others = f" (nor have {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        raise ValueError(f"data: {lacking[0]} has no label map {maps.name}/…png{others} in {maps}")
    return LabelledScenes(tuple(paths), tuple(annotations), _classes(root / NAMES))


def maps_without_image(root: str | os.PathLike[str], split: str) -> list[str]:
    """Names of the label maps of a split that are left out, as there is no image to them."""
    images, maps = Path(root, "images", split), Path(root, "annotations", split)
    stems = {path.stem for path in images.iterdir() if _is_image(path)}
    every = (path for path in maps.glob("*.png") if not path.name.startswith("."))
    return sorted(path.name for path in every if path.stem not in stems)


def _classes(path: Path) -> tuple[str, ...]:
    """The names that the list has: columns apart by tabs, the number first, the names last."""
    if not path.is_file():
        return tuple(f"class {i}" for i in range(1, _NUM_CLASSES + 1))
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [line.split("\t") for line in lines if line.strip()]
    rows = rows[1:] if rows and not rows[0][0].strip().isdigit() else rows  # without the heading
    for place, row in enumerate(rows, start=1):
        if len(row) < 2 or row[0].strip() != str(place) or not row[-1].strip():
            raise ValueError(
                f"data: {path}: expected a number from 1 and a name, apart by tabs, for each "
                f"class, got {row[0] if row else ''!r} for class {place}"
            )
    if not 2 <= len(rows) <= _MOST_CLASSES:
        raise ValueError(f"data: {path}: expected 2 to {_MOST_CLASSES} classes, got {len(rows)}")
    whole = [row[-1].strip() for row in rows]
    first = [name.partition(",")[0].partition(";")[0].strip() for name in whole]
    names = first if len(set(first)) == len(first) else whole
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"data: {path}: {twice!r} is named twice")
    return tuple(names)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
