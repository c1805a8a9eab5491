"""Real handwritten digits as an image folder: 1,797 grey images of 8×8, from scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import needed

with needed("writing images"):
    from PIL import Image


def write_digits(root: Path, digits: range, test_share: float = 0.5) -> int:
    """Write the images of `digits` as `root/{train,test}/<digit>/*.png` and return how many."""
    written = 0
    for split, digit, pixels in split_digits(digits, test_share):
        folder = root / split / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        for place, image in enumerate(pixels):
            Image.fromarray(image).save(folder / f"{place:04}.png")
        written += len(pixels)
    return written


def split_digits(digits: range, test_share: float) -> Iterator[tuple[str, int, Any]]:
    """The images of each of `digits`, uint8 `[n, 8, 8]`, of which split, `train` or `test`.

    In scikit-learn's order neighbours are often by the same writer, so of each digit the first
    images are for training and the last ones for testing.
    """
    data = read_digits()
    for digit in digits:
        values = data.images[data.target == digit]  # [n, 8, 8], 0 to 16
        pixels = np.minimum(values * 16, 255).astype(np.uint8)
        first_test = round(len(pixels) * (1 - test_share))
        yield "train", digit, pixels[:first_test]
        yield "test", digit, pixels[first_test:]


def read_digits() -> Any:
    """scikit-learn's data set.

    Raises:
        MissingExtra: it is not installed.
    """
    with needed("reading the handwritten digits"):
        from sklearn.datasets import load_digits
    return load_digits()
