"""What the files of a data set list: its classes, and the images of each split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Listing:
    """Images by split, as listed; nothing is said of whether they are there.

    Attributes:
        classes: their names, in the order of their numbers.
        train: pairs of a file and its class, an index into `classes`.
        val: likewise; `None` where the data set has no validation images of its own.
        test: likewise.
    """

    classes: tuple[str, ...]
    train: Sequence[tuple[Path, int]]
    val: Sequence[tuple[Path, int]] | None
    test: Sequence[tuple[Path, int]]


def numbered(splits: Mapping[str, Iterable[tuple[Path, int]]], names: Mapping[int, str]) -> Listing:
    """A listing of images whose classes are numbers with gaps, or that begin at 1.

    Args:
        splits: for `train`, `test` and maybe `val` the images with the numbers of their classes.
        names: of classes by number; a number that has none stands for itself, and where two classes
            have one name their numbers come before it.
    """
    rows = {split: list(images) for split, images in splits.items()}
    used = sorted({number for images in rows.values() for _, number in images})
    shown = [names.get(number, str(number)) for number in used]
    if len(set(shown)) < len(shown):
        shown = [f"{number} {name}" for number, name in zip(used, shown, strict=True)]
    label = {number: place for place, number in enumerate(used)}
    images = {split: [(p, label[n]) for p, n in listed] for split, listed in rows.items()}
    return Listing(tuple(shown), images["train"], images.get("val"), images["test"])


def first_there(root: Path, names: Iterable[str]) -> Path:
    """The first of several places below `root` where a file or folder may be.

    Raises:
        ValueError: it is in none of them.
    """
    names = list(names)
    for name in names:
        if (root / name).exists():
            return root / name
    others = f" (nor {', '.join(names[1:])})" if names[1:] else ""
    raise ValueError(f"{root / names[0]}: no such file or folder{others}")
