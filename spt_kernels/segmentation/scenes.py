"""Reading a scene: its pixels, and the class of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import needed
from ..finetuning.images.image_file import opened
from ..finetuning.images.image_mode import in_eight_bits
from ..finetuning.images.upright import turn_of, turned, upright
from .ade20k import IGNORED
from .form import SceneForm

with needed("reading images"):
    from PIL import Image

_NO_LABELS = "{path}: cannot read the label map ({reason})"


def read_image(path: Path) -> Image.Image:
    """Read an image in RGB, upright.

    Raises:
        ValueError: it is no image, or damaged.
    """
    with opened(path) as file:
        return in_eight_bits(upright(file), file, "RGB")


def read_labels(path: Path, num_classes: int) -> np.ndarray:
    """Read a label map: uint8 `[height, width]`, a class from 0 or `IGNORED`.

    In the file, 0 (and 255) is a pixel without a class, and others are 1 more than their class.

    Raises:
        ValueError: it is no picture of one channel, or has a class that is not among them.
    """
    with opened(path, _NO_LABELS) as file:
        mode, values = file.mode, np.asarray(file)
    if values.ndim != 2:
        raise ValueError(f"{path}: expected a label map of one channel, got mode {mode}")
    values = values.astype(np.int64)
    known = (values >= 0) & (values <= num_classes) | (values == IGNORED)
    if not known.all():
        raise ValueError(
            f"{path}: expected labels of 0 to {num_classes}, got {values[~known].flat[0]}"
        )
    has_class = (values > 0) & (values <= num_classes)
    return np.where(has_class, values - 1, IGNORED).astype(np.uint8)


def read_scene(path: Path, annotation: Path, num_classes: int) -> tuple[Image.Image, np.ndarray]:
    """Read an image with its label map, both upright.

    A label map knows of no rotation by EXIF: it is turned as its image is, unless it has the size
    of the upright one already.

    Raises:
        ValueError: as `read_image` and `read_labels`, or they are of different sizes.
    """
    with opened(path) as file:
        turn, lying = turn_of(file), file.size
        image = in_eight_bits(turned(file, turn), file, "RGB")
    labels = read_labels(annotation, num_classes)
    if turn is not None and labels.shape == lying[::-1]:
        labels = np.array(turned(Image.fromarray(labels), turn))
    rows, columns = labels.shape
    _check_sizes(annotation, image.size, (columns, rows))
    return image, labels


def glance_at_scene(path: Path, annotation: Path) -> None:
    """Look how an image and its label map begin.

    Raises:
        ValueError: one of them is no image, or they are of different sizes.
    """
    with opened(path) as file:
        size = file.size
    with opened(annotation, _NO_LABELS) as file:
        of_labels = file.size
    if size != of_labels:  # which may be that of the upright one
        with opened(path) as file:
            size = upright(file).size
    _check_sizes(annotation, size, of_labels)


def as_pixels(image: Image.Image) -> Tensor:
    """An RGB image as uint8 `[3, height, width]`."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def normalised(pixels: Tensor, form: SceneForm) -> Tensor:
    """Pixels `[B, 3, height, width]` in uint8 as the floats that the model takes."""
    mean = torch.tensor(form.mean, device=pixels.device).view(1, -1, 1, 1) * 255
    std = torch.tensor(form.std, device=pixels.device).view(1, -1, 1, 1) * 255
    return pixels.float().sub_(mean).div_(std)


def _check_sizes(annotation: Path, image: tuple[int, int], labels: tuple[int, int]) -> None:
    if image != labels:
        (width, height), (columns, rows) = image, labels
        raise ValueError(
            f"{annotation}: expected the {width} × {height} of its image, got {columns} × {rows}"
        )
