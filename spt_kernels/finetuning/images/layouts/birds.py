"""CUB-200-2011 and NABirds: text files with a line for each image."""

from __future__ import annotations

from pathlib import Path

from ..image_list import text_of
from .listing import Listing, first_there, numbered

SIGNS = ("images.txt", "image_class_labels.txt", "train_test_split.txt")


def read(root: Path) -> Listing:
    """Read `images.txt`, `image_class_labels.txt`, `train_test_split.txt` and `classes.txt`.

    Each line is the identifier of an image, whatever it looks like, and its path below `images/`,
    the number of its class, or 1 where it is to train on. Numbers that no image has, as those of
    the upper levels of NABirds' taxonomy, are no classes.

    Raises:
        ValueError: a file is missing or malformed, or the files are not of the same images.
    """
    paths = _column(root / "images.txt")
    labels = _numbers(root / "image_class_labels.txt", paths)
    is_train = _numbers(root / "train_test_split.txt", paths)
    if odd := next((f"{i} {n}" for i, n in is_train.items() if n not in (0, 1)), None):
        raise ValueError(f"{root / 'train_test_split.txt'}: expected 0 or 1, got {odd!r}")
    folder = first_there(root, ["images"])
    rows = {
        split: [(folder / path, labels[i]) for i, path in paths.items() if is_train[i] == wanted]
        for split, wanted in (("train", 1), ("test", 0))
    }
    names = _column(root / "classes.txt") if (root / "classes.txt").is_file() else {}
    return numbered(rows, {int(number): name for number, name in names.items()})


def _column(file: Path) -> dict[str, str]:
    """What stands behind the first word of each line, which may be several words."""
    column = {}
    for number, line in enumerate(text_of(file).split("\n"), start=1):
        first, _, rest = line.strip().partition(" ")
        if not first:
            continue
        if not rest.strip():
            raise ValueError(f"{file}, line {number}: expected two columns, got {line.strip()!r}")
        column[first] = rest.strip()
    return column


def _numbers(file: Path, images: dict[str, str]) -> dict[str, int]:
    """A number for each of `images`."""
    column = _column(file)
    if odd := next((f"{i} {text}" for i, text in column.items() if not text.isdecimal()), None):
        raise ValueError(f"{file}: expected a number for each image, got {odd!r}")
    if lacking := [identifier for identifier in images if identifier not in column]:
        raise ValueError(f"{file}: has no line for {len(lacking)} images, as {lacking[0]}")
    return {identifier: int(text) for identifier, text in column.items()}
