"""Stanford Dogs: a folder per breed, and two `.mat` files that list what is in which split."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from .listing import Listing, first_there, numbered
from .mat_file import read_mat

SIGNS = ("lists/train_list.mat", "train_list.mat", "lists/test_list.mat", "test_list.mat")


def read(root: Path) -> Listing:
    """Read `train_list.mat` and `test_list.mat`, beside `Images/` or in `lists/`.

    Raises:
        ValueError: a file is missing or malformed.
    """
    folder = first_there(root, ["Images", "images"])
    names: dict[int, str] = {}
    rows = {}
    for split in ("train", "test"):
        file = first_there(root, [f"lists/{split}_list.mat", f"{split}_list.mat"])
        paths, labels = read_mat(file, "file_list", "labels")
        if len(paths) != len(labels):
            raise ValueError(f"{file}: {len(paths)} files, {len(labels)} labels")
        listed = [(str(path), int(label)) for path, label in zip(paths, labels, strict=True)]
        names |= {label: PurePosixPath(path).parent.name for path, label in listed}
        rows[split] = [(folder / path, label) for path, label in listed]
    return numbered(rows, names)
