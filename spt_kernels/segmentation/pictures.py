"""Label maps as pictures: in the colours of a palette, and laid over their images."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..errors import needed
from ..files.atomic import try_folder, write_atomically

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
        ValueError: it is a file, or not empty, or cannot be written to.
    """
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_predictions: expected a folder, got the file {folder}")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        if not force and folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"save_predictions: {folder} is not empty (`force` overwrites what is called alike)"
            )
        folder.mkdir(parents=True, exist_ok=True)
        try_folder(folder)
    except OSError as error:
        raise ValueError(
            f"save_predictions: cannot write to {folder} ({error.strerror or error})"
        ) from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it was not made, or has something in it by now
                path.rmdir()


def check_names(
    images: Sequence[Path],
    folder: Path,
    *,
    besides: Iterable[Path] = (),
    argument: str = "save_to",
) -> None:
    """Refuse to write two pictures into one file, or one over a file that is read.

    Args:
        images: whose label maps `save_prediction` is to write.
        folder: into this one.
        besides: other files that must stay, as the true label maps.
        argument: what to call the folder in the message.

    Raises:
        ValueError: two images, or an image and the overlay of another, have one name there; or an
            image, or a file of `besides`, is there under such a name.
    """
    by_name: dict[str, Path] = {}
    for image in images:
        for name in _names(image.stem):
            if (other := by_name.setdefault(name, image)) != image:
                raise ValueError(
                    f"images: {other} and {image} would both be written as {name}: rename one, or "
                    "write them to different folders"
                )
    there = {own for name in by_name if (own := _identity(folder / name)) is not None}
    for path in (*images, *besides) if there else ():
        if _identity(path) in there:
            raise ValueError(
                f"{argument}: {path} is read, and a predicted label map would be written over it: "
                f"name another folder than {folder}"
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
    label_map, overlay = (folder / own for own in _names(name))
    save_label_map(label_map, labels, num_classes)
    save_overlay(overlay, image, labels, num_classes)


def _names(stem: str) -> tuple[str, str]:
    """The files of an image's label map and its overlay."""
    return f"{stem}.png", f"{stem}-overlay.png"


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file it is, by whatever name; `None` if there is none."""
    with contextlib.suppress(OSError):
        own = path.stat()
        return own.st_dev, own.st_ino
    return None


def _write(path: Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
