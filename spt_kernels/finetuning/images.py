"""Image files with their labels: read from folders or lists, drawn class by class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


@dataclass(frozen=True)
class LabelledImages:
    """Files and what is on them.

    Attributes:
        paths: the files, in a fixed order.
        labels: for each file an index into `classes`.
        classes: their names.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Sequence[int]) -> LabelledImages:
        """Those at `indices`, in that order."""
        paths = tuple(self.paths[i] for i in indices)
        return LabelledImages(paths, tuple(self.labels[i] for i in indices), self.classes)

    def restrict(self, classes: Sequence[str]) -> LabelledImages:
        """Those of `classes` alone, whose order gives the new labels."""
        unknown = [name for name in classes if name not in self.classes]
        if unknown:
            raise ValueError(
                f"classes: {unknown[0]!r} is not among the data's {_shorten(self.classes)}"
            )
        if len(set(classes)) != len(classes):
            raise ValueError(f"classes: one is named twice in {', '.join(classes)}")
        new = {self.classes.index(name): label for label, name in enumerate(classes)}
        kept = [i for i, label in enumerate(self.labels) if label in new]
        return LabelledImages(
            tuple(self.paths[i] for i in kept),
            tuple(new[self.labels[i]] for i in kept),
            tuple(classes),
        )

    def counts(self) -> list[int]:
        """Images per class."""
        return torch.tensor(self.labels).bincount(minlength=len(self.classes)).tolist()


def read_folder(root: str | os.PathLike[str]) -> LabelledImages:
    """Read one split in torchvision's ImageFolder layout: a folder per class, images at any depth.

    Raises:
        ValueError: `root` is no folder, holds no class folder, or a class has no image.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"no such folder: {root}")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not classes:
        raise ValueError(f"{root}: expected one folder per class, found none")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"{root / name}: no images ({', '.join(SUFFIXES[:3])} …)")
        paths += found
        labels += [label] * len(found)
    return LabelledImages(tuple(paths), tuple(labels), tuple(classes))


def read_list(
    file: str | os.PathLike[str], root: str | os.PathLike[str], classes: Sequence[str] | None = None
) -> LabelledImages:
    """Read a VTAB-style list, one `path label` per line, paths relative to `root`.

    Args:
        file: the list. Labels are integers from 0, or names.
        root: the folder that the paths start from.
        classes: class names of the training list, which the labels of another list must be among.

    Raises:
        ValueError: a line without a label, a label unknown or negative, a file that is not there.
    """
    rows = _rows_of(Path(file))
    if classes is None:
        classes = _classes_of([label for _, _, label in rows])
    index = {name: label for label, name in enumerate(classes)}
    paths: list[Path] = []
    labels: list[int] = []
    for line, name, label in rows:
        if label not in index:
            raise ValueError(f"{file}, line {line}: {label!r} is not a class of the training list")
        path = Path(root) / name
        if not path.is_file():
            raise ValueError(f"{file}, line {line}: no such file: {path}")
        paths.append(path)
        labels.append(index[label])
    return LabelledImages(tuple(paths), tuple(labels), tuple(classes))


def draw_balanced(
    images: LabelledImages, count: int, seed: int
) -> tuple[LabelledImages, LabelledImages]:
    """Draw `count` images, as many of each class as there are to have, and return the rest too."""
    available = images.counts()
    wanted = [0] * len(available)
    while sum(wanted) < min(count, sum(available)):
        for label in range(len(wanted)):
            if wanted[label] < available[label] and sum(wanted) < count:
                wanted[label] += 1
    return _draw(images, wanted, seed)


def draw_proportional(
    images: LabelledImages, share: float, seed: int
) -> tuple[LabelledImages, LabelledImages]:
    """Draw a share of each class, at least one image where it has two, and return the rest."""
    wanted = [
        min(available - 1, max(1, round(share * available))) if available > 1 else 0
        for available in images.counts()
    ]
    return _draw(images, wanted, seed)


def _draw(
    images: LabelledImages, wanted: list[int], seed: int
) -> tuple[LabelledImages, LabelledImages]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(images.labels)
    chosen: list[int] = []
    for label, count in enumerate(wanted):
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        chosen += members[order[:count]].tolist()
    chosen.sort()
    rest = sorted(set(range(len(images))) - set(chosen))
    return images.take(chosen), images.take(rest)


def _rows_of(file: Path) -> list[tuple[int, str, str]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a text file") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        parts = line.rsplit(maxsplit=1)  # a path may hold spaces, a label may not
        if len(parts) != 2:
            raise ValueError(f"{file}, line {number}: expected 'path label', got {line.strip()!r}")
        rows.append((number, parts[0].strip(), parts[1]))
    if not rows:
        raise ValueError(f"{file}: the list is empty")
    return rows


def _classes_of(labels: list[str]) -> tuple[str, ...]:
    if all(label.lstrip("-").isdigit() for label in labels):
        numbers = [int(label) for label in labels]
        if min(numbers) < 0:
            raise ValueError(f"labels start at 0, the list has {min(numbers)}")
        return tuple(str(label) for label in range(max(numbers) + 1))
    return tuple(sorted(set(labels)))


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown}, … ({len(names)})"
