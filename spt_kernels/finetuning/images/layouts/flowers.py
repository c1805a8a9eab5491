"""Oxford Flowers 102: numbered images, their labels and their split in two `.mat` files."""

from __future__ import annotations

from pathlib import Path

from .listing import Listing, first_there, numbered
from .mat_file import read_mat

SIGNS = ("imagelabels.mat", "setid.mat")


def read(root: Path) -> Listing:
    """Read `imagelabels.mat` and `setid.mat`; image 7 is `jpg/image_00007.jpg`.

    The classes are called by their numbers, from 1, as the data set tells no names.

    Raises:
        ValueError: a file is missing or malformed, or a split has an image without a label.
    """
    (labels,) = read_mat(first_there(root, ["imagelabels.mat"]), "labels")
    setid = first_there(root, ["setid.mat"])
    folder = first_there(root, ["jpg"])
    rows = {}
    for split, numbers in zip(
        ("train", "val", "test"), read_mat(setid, "trnid", "valid", "tstid"), strict=True
    ):
        if odd := [n for n in numbers.tolist() if not 1 <= n <= len(labels)]:
            raise ValueError(f"{setid}: image {odd[0]} is none of the {len(labels)} with a label")
        rows[split] = [
            (folder / f"image_{number:05}.jpg", int(labels[number - 1]))
            for number in map(int, numbers)
        ]
    return numbered(rows, {})
