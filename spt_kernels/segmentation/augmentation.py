"""A random square of a scene, as SETR and its successors train on: scaled, cropped, distorted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..errors import needed
from .ade20k import IGNORED
from .form import SceneForm
from .scenes import as_pixels

with needed("reading images"):
    from PIL import Image

_RATIOS = (0.5, 2.0)  # of the size that a whole image is tested at
_MOST_OF_ONE_CLASS = 0.75  # of the labelled pixels of a crop, after how many tries at most
_TRIES = 10
_BRIGHTNESS = 32.0
_FACTORS = (0.5, 1.5)  # of contrast and of saturation
_HUE = 18 / 180  # of the circle of hues


def augmented(
    image: Image.Image, labels: np.ndarray, form: SceneForm, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw a square of a scene: the augmentation of SETR (Zheng et al., CVPR 2021) on ADE20K.

    The scene is scaled by 0.5 to 2 times its size in tests. Of the squares tried, one is taken in
    which no class has more than three quarters of the labelled pixels. It is mirrored or not, and
    its brightness, contrast, saturation and hue are changed, each or not. What is missing of a
    square is of the mean colour, and without labels.

    Args:
        image: in RGB.
        labels: uint8 `[height, width]`.
        form: how large the square is.
        generator: all is drawn from it.

    Returns:
        uint8 `[3, size, size]` and uint8 `[size, size]`.
    """
    draw = _Draw(generator)
    height, width = form.scaled(image.height, image.width, draw.between(*_RATIOS))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    labels = np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))
    left, top = _corner(labels, form.size, draw)
    image = image.crop((left, top, min(left + form.size, width), min(top + form.size, height)))
    labels = labels[top : top + form.size, left : left + form.size]
    pixels = np.asarray(image)
    if draw.coin():
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    pixels = _distorted(pixels.copy(), draw)
    square = torch.tensor([round(255 * value) for value in form.mean], dtype=torch.uint8)
    square = square.view(3, 1, 1).repeat(1, form.size, form.size)
    target = torch.full((form.size, form.size), IGNORED, dtype=torch.uint8)
    rows, columns = labels.shape
    square[:, :rows, :columns] = as_pixels(Image.fromarray(pixels))
    target[:rows, :columns] = torch.from_numpy(labels.copy())
    return square, target


class _Draw:
    """Random numbers of one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def between(self, low: float, high: float) -> float:
        share = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        return low + (high - low) * share

    def below(self, stop: int) -> int:
        return int(torch.randint(stop, (), generator=self._generator))

    def coin(self) -> bool:
        return bool(self.below(2))


def _corner(labels: np.ndarray, size: int, draw: _Draw) -> tuple[int, int]:
    """The left and top of a square that is not nearly of one class, or the last that was tried."""
    height, width = labels.shape
    left = top = 0
    for _ in range(_TRIES):
        left = draw.below(max(width - size, 0) + 1)
        top = draw.below(max(height - size, 0) + 1)
        seen = np.bincount(labels[top : top + size, left : left + size].ravel(), minlength=256)
        seen = seen[np.arange(256) != IGNORED]
        if seen.max() < _MOST_OF_ONE_CLASS * seen.sum():
            break
    return left, top


def _distorted(pixels: np.ndarray, draw: _Draw) -> np.ndarray:
    """Other brightness, contrast, saturation and hue, the contrast before or after the colours."""
    if draw.coin():
        pixels = _clipped(pixels + draw.between(-_BRIGHTNESS, _BRIGHTNESS))
    steps: list[Callable[[np.ndarray, _Draw], np.ndarray]] = [_other_saturation, _other_hue]
    steps.insert(0 if draw.coin() else len(steps), _other_contrast)
    for step in steps:
        if draw.coin():
            pixels = step(pixels, draw)
    return pixels


def _other_contrast(pixels: np.ndarray, draw: _Draw) -> np.ndarray:
    return _clipped(pixels * draw.between(*_FACTORS))


def _other_saturation(pixels: np.ndarray, draw: _Draw) -> np.ndarray:
    hsv = np.array(Image.fromarray(pixels).convert("HSV"))
    hsv[..., 1] = _clipped(hsv[..., 1] * draw.between(*_FACTORS))
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def _other_hue(pixels: np.ndarray, draw: _Draw) -> np.ndarray:
    hsv = np.array(Image.fromarray(pixels).convert("HSV"))
    shift = round(256 * draw.between(-_HUE, _HUE))
    hsv[..., 0] = (hsv[..., 0].astype(np.int64) + shift) % 256
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def _clipped(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
