"""Label maps as pictures: in the colours of a palette, and laid over their images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from ..errors import needed
from ..files.atomic import write_atomically

with needed("drawing label maps"):
    from PIL import Image

_SHARE = 0.5  # of the palette's colour in an overlay
_BLACK = (0, 0, 0)


def check_folder(folder: Path | None, *, force: bool) -> None:
    """Refuse a folder for predictions that holds something: true label maps are called alike.

    Args:
        folder: for label maps; `None` is fine.
        force: whether what is called alike is overwritten.

    Raises:
        ValueError: it is a file, or not empty.
    """
    if folder is None or not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"save_predictions: expected a folder, got the file {folder}")
    if not force and any(folder.iterdir()):
        raise ValueError(
            f"save_predictions: {folder} is not empty (`force` overwrites what is called alike)"
        )


def palette(num_classes: int) -> list[tuple[int, int, int]]:
    """A colour for each class, neighbours far apart; the same every time.

    The bits of a class's number, the lowest first, go to red, green and blue in turn, each to the
    highest bit that is left, as in PASCAL VOC's label maps: small numbers differ most.
    """
    colours = []
    for label in range(1, num_classes + 1):
        channels = [0, 0, 0]
        for bit in range(8):
            if label >> bit & 1:
                channels[bit % 3] |= 128 >> bit // 3
        colours.append((channels[0], channels[1], channels[2]))
    return colours


def save_label_map(path: Path, labels: np.ndarray, num_classes: int) -> None:
    """Write a label map as ADE20K's own: a PNG whose values are 1 more than the class.

    A palette gives it colours for people; a reader of values does not see it.

    Args:
        path: of the PNG; an older one is replaced.
        labels: a class per pixel, `[height, width]`.
        num_classes: at most 255.
    """
    picture = Image.fromarray((labels + 1).astype(np.uint8), "P")
    picture.putpalette([value for colour in (_BLACK, *palette(num_classes)) for value in colour])
    _write(path, picture)


def save_overlay(path: Path, image: Image.Image, labels: np.ndarray, num_classes: int) -> None:
    """Write an image with its label map's colours laid over it, as a PNG.

    Args:
        path: of the PNG; an older one is replaced.
        image: in RGB.
        labels: a class per pixel, `[height, width]`, as large as the image.
        num_classes: of the palette.
    """
    colours = np.array(palette(num_classes), dtype=np.float32)[labels]
    mixed = (1 - _SHARE) * np.asarray(image, dtype=np.float32) + _SHARE * colours
    _write(path, Image.fromarray(np.rint(mixed).astype(np.uint8)))


def save_prediction(
    folder: Path, name: str, image: Image.Image, labels: np.ndarray, num_classes: int
) -> None:
    """Write both into `folder`, which is made: `<name>.png` and `<name>-overlay.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_label_map(folder / f"{name}.png", labels, num_classes)
    save_overlay(folder / f"{name}-overlay.png", image, labels, num_classes)


def _write(path: Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
