"""The splits of Visual Prompt Tuning (Jia et al., ECCV 2022): a JSON file for each."""

from __future__ import annotations

import json
from pathlib import Path

from .listing import Listing

FILES = ("train.json", "val.json", "test.json")


def is_there(root: Path) -> bool:
    """Whether the splits are in the folder of a data set.

    Raises:
        ValueError: some of the three files are, and others are not.
    """
    lacking = [name for name in FILES if not (root / name).is_file()]
    if lacking and len(lacking) < len(FILES):
        raise ValueError(
            f"{root / lacking[0]}: no such file; VPT's splits are {', '.join(FILES)}: without any "
            "of them the data set's own lists are read"
        )
    return not lacking


def read(root: Path, folder: str) -> Listing:
    """Read `{path: class}` of each split, the paths below `root/folder`, or `root`.

    The classes are those of the training images, in the order of their numbers or names.

    Raises:
        ValueError: a file is malformed, or has a class that the training images lack.
    """
    found = {name: _rows(root / name) for name in FILES}
    classes = sorted(set(found["train.json"].values()), key=lambda c: (isinstance(c, str), c))
    label = {name: place for place, name in enumerate(classes)}
    splits = []
    for file, rows in found.items():
        if odd := next((name for name in rows.values() if name not in label), None):
            raise ValueError(f"{root / file}: class {odd!r} has no image in {FILES[0]}")
        # some begin at the folder of the images, others at the root
        is_below = not (root / next(iter(rows))).is_file()
        start = root / folder if is_below else root
        splits.append([(start / path, label[name]) for path, name in rows.items()])
    return Listing(tuple(map(str, classes)), *splits)


def _rows(file: Path) -> dict[str, int | str]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot read the split ({error})") from error
    if not isinstance(rows, dict) or not rows:
        raise ValueError(f"{file}: expected an object of paths and classes")
    for path, name in rows.items():
        if not isinstance(name, (int, str)) or isinstance(name, bool):
            raise ValueError(f"{file}: expected a number or a name for {path}, got {name!r}")
    return rows
