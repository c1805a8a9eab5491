"""Image files with their labels: read from folders or lists, drawn class by class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .image_list import classes_of, rows_of

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"),
    ".jfif",  # as which browsers on Windows saved JPEGs
)
_LEFT_BEHIND = {"__MACOSX", "@eaDir"}  # by archives of macOS, by a Synology's previews


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

    def joined(self, others: LabelledImages) -> LabelledImages:
        """These, then others of the same classes."""
        assert self.classes == others.classes
        return LabelledImages(self.paths + others.paths, self.labels + others.labels, self.classes)

    def counts(self) -> list[int]:
        """Images per class."""
        return torch.tensor(self.labels).bincount(minlength=len(self.classes)).tolist()


def named_images(images: LabelledImages | None) -> list[tuple[str, str, int]]:
    """The images of a split, by what does not change where their folder is moved."""
    if images is None:
        return []
    rows = zip(images.paths, images.labels, strict=True)
    return [(path.parent.name, path.name, label) for path, label in rows]


def read_folder(root: str | os.PathLike[str], *, allow_empty: bool = False) -> LabelledImages:
    """Read one split in torchvision's ImageFolder layout: a folder per class, images at any depth.

    What is hidden, its name beginning with a dot, is no class, folder or image. Linked folders are
    followed, those that lead back to themselves once.

    Args:
        root: the folder.
        allow_empty: whether classes without an image are as if they were not there.

    Raises:
        ValueError: `root` is no folder, holds no class folder, or a class has no image.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"no such folder: {root}")
    named = sorted(
        entry.name for entry in root.iterdir() if _is_shown(entry.name) and entry.is_dir()
    )
    if not named:
        raise ValueError(f"{root}: expected one folder per class, found none{_loose(root)}")
    found = {name: sorted(images_below(root / name, (_identity(root),))) for name in named}
    empty = [name for name in named if not found[name]]
    if len(empty) == len(named) or (empty and not allow_empty):
        others = f" (and {len(empty) - 1} more folders)" if len(empty) > 1 else ""
        raise ValueError(
            f"{root / empty[0]}{others}: no images ({', '.join(SUFFIXES[:3])} …); "
            "a folder that is no class must be moved out"
        )
    classes = tuple(name for name in named if found[name])
    paths = [path for name in classes for path in found[name]]
    labels = [label for label, name in enumerate(classes) for _ in found[name]]
    return LabelledImages(tuple(paths), tuple(labels), classes)


def images_below(folder: Path, inside: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """Images in a folder at any depth, links followed, hidden ones left out; in no order.

    Args:
        folder: where to look.
        inside: the folders on the way to it, which a link may lead back to.
    """
    identity = _identity(folder)
    if identity in inside:
        return  # a link back to where it is
    with os.scandir(folder) as entries:  # which knows what is a folder without asking each
        for entry in entries:
            if not _is_shown(entry.name):
                continue
            if entry.is_dir():
                yield from images_below(Path(entry.path), (*inside, identity))
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                yield Path(entry.path)


def read_list(
    file: str | os.PathLike[str], root: str | os.PathLike[str], classes: Sequence[str] | None = None
) -> LabelledImages:
    """Read a VTAB-style list, one `path label` per line, paths relative to `root`.

    Args:
        file: the list, in UTF-8 or as Windows writes it. Labels are integers from 0, or names; one
            with spaces is parted from the path by a tab.
        root: the folder that the paths start from.
        classes: class names that the labels must be among, as those of the training list.

    Raises:
        ValueError: a line without a label, a label unknown or negative, a file that is not there.
    """
    rows = rows_of(Path(file))
    if classes is None:
        classes = classes_of([label for _, _, label in rows])
    index = {name: label for label, name in enumerate(classes)}
    paths: list[Path] = []
    labels: list[int] = []
    for line, name, label in rows:
        if label not in index:
            raise ValueError(
                f"{file}, line {line}: {label!r} is none of the {len(classes)} classes, "
                f"{_shorten(classes)}"
            )
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


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown}, … ({len(names)})"


def _identity(folder: Path) -> tuple[int, int]:
    state = folder.stat()
    return state.st_dev, state.st_ino


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name not in _LEFT_BEHIND


def _loose(root: Path) -> str:
    """A word where the images lie in the folder itself."""
    loose = [p for p in root.iterdir() if _is_shown(p.name) and p.suffix.lower() in SUFFIXES]
    return f" but {len(loose)} images that are in no folder" if loose else ""
