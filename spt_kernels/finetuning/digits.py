"""Real handwritten digits as an image folder: 1,797 grey images of 8×8, from scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_digits(root: Path, digits: range, test_share: float = 0.5) -> int:
    """Write the images of `digits` as `root/{train,test}/<digit>/*.png` and return how many.

    In scikit-learn's order neighbours are often by the same writer, so of each digit the first
    images are for training and the last ones for testing.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    written = 0
    for digit in digits:
        images = data.images[data.target == digit]  # [n, 8, 8], values 0 to 16
        first_test = round(len(images) * (1 - test_share))
        for place, image in enumerate(images):
            folder = root / ("train" if place < first_test else "test") / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.minimum(image * 16, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{place:04}.png")
            written += 1
    return written
