"""Image files with their labels: read from lists, put in the order of classes, drawn from."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

_NUMBER = re.compile("0|-?[1-9][0-9]{0,5}")  # as it is counted; `007` is a name


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

    def restrict(self, classes: Sequence[str], *, all_there: bool = True) -> LabelledImages:
        """Those of `classes` alone, whose order gives the new labels.

        Args:
            classes: names.
            all_there: whether each must be among the data's; else one of them must be.

        Raises:
            ValueError: a class is named twice or is not among the data's, or no image is left.
        """
        unknown = [name for name in classes if name not in self.classes]
        if unknown and (all_there or len(unknown) == len(classes)):
            raise ValueError(
                f"classes: {unknown[0]!r} is not among the data's {_shorten(self.classes)}"
            )
        if len(set(classes)) != len(classes):
            twice = next(name for name in classes if list(classes).count(name) > 1)
            raise ValueError(f"classes: {twice!r} is named twice")
        place = {name: label for label, name in enumerate(classes)}
        new = {label: place[name] for label, name in enumerate(self.classes) if name in place}
        kept = [i for i, label in enumerate(self.labels) if label in new]
        if not kept:
            raise ValueError(f"classes: the data has no image of {_shorten(classes)}")
        return LabelledImages(
            tuple(self.paths[i] for i in kept),
            tuple(new[self.labels[i]] for i in kept),
            tuple(classes),
        )

    def counts(self) -> list[int]:
        """Images per class."""
        return torch.tensor(self.labels).bincount(minlength=len(self.classes)).tolist()


def read_list(
    file: str | os.PathLike[str], root: str | os.PathLike[str], classes: Sequence[str] | None = None
) -> LabelledImages:
    """Read a VTAB-style list, one `path label` per line, paths relative to `root`.

    Args:
        file: the list, in UTF-8 or as Windows writes it. Labels are integers from 0, or names; one
            with spaces is parted from the path by a tab.
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
    rows = []
    for number, line in enumerate(_text_of(file).split("\n"), start=1):
        if not line.strip():
            continue
        # a path may hold spaces; a label may where a tab parts them
        parts = line.rsplit("\t", 1) if "\t" in line.strip() else line.rsplit(maxsplit=1)
        path, label = (parts[0].strip(), parts[-1].strip())
        if len(parts) != 2 or not path or not label:
            raise ValueError(f"{file}, line {number}: expected 'path label', got {line.strip()!r}")
        rows.append((number, path, label))
    if not rows:
        raise ValueError(f"{file}: the list is empty")
    return rows


def _text_of(file: Path) -> str:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: cannot read the list ({error.strerror})") from error
    # the mark that Windows begins a text with says how it is written, and is no part of it
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a text file in UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{file}: not a text file in UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _classes_of(labels: list[str]) -> tuple[str, ...]:
    if all(_NUMBER.fullmatch(label) for label in labels):
        numbers = [int(label) for label in labels]
        if min(numbers) < 0:
            raise ValueError(f"labels start at 0, the list has {min(numbers)}")
        return tuple(str(label) for label in range(max(numbers) + 1))
    return tuple(sorted(set(labels)))


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown}, … ({len(names)})"
