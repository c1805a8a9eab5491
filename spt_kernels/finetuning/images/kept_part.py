"""Which part of an image is kept, and whether it is mirrored."""

from __future__ import annotations

import math

import torch

FITS = ("squash", "crop")
AUGMENTATIONS = ("none", "crop-flip", "random-crop-flip", "resized-crop-flip")

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

# of what is known as Inception's crop (Szegedy et al., 2015), as torchvision draws it
_LEAST_AREA = 0.08
_WIDEST = 4 / 3
_TRIES = 10


def kept_part(
    size: tuple[int, int],
    fit: str,
    crop_pct: float,
    augment: str,
    generator: torch.Generator | None,
) -> tuple[Box, bool]:
    """The box of an image that is brought to size, and whether it is mirrored then.

    Args:
        size: width and height.
        fit: one of `FITS`.
        crop_pct: the share of each side that is kept, in the middle.
        augment: one of `AUGMENTATIONS`.
        generator: what is drawn comes from it; without one nothing is.
    """
    width, height = size
    if fit == "crop":
        width = height = min(size)
    if generator is None or augment == "none":
        return _placed(size, width * crop_pct, height * crop_pct, 0.5, 0.5), False
    if augment == "resized-crop-flip":
        return _resized(size, generator)
    area, across, down, coin = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    share = crop_pct if augment == "random-crop-flip" else (0.5 + 0.5 * area) ** 0.5
    return _placed(size, width * share, height * share, across, down), coin < 0.5


def _placed(size: tuple[int, int], width: float, height: float, across: float, down: float) -> Box:
    """A box of a width and height, from the left and top by shares of the room that there is."""
    left, top = across * (size[0] - width), down * (size[1] - height)
    return left, top, left + width, top + height


def _resized(size: tuple[int, int], generator: torch.Generator) -> tuple[Box, bool]:
    """A box of 8 to 100 % of the area, of sides 3 to 4 up to 4 to 3."""
    drawn = torch.rand(_TRIES + 2, 2, generator=generator, dtype=torch.float64).tolist()
    (across, down), (coin, _), *tries = drawn
    whole = size[0] * size[1]
    for share, shape in tries:
        area = whole * (_LEAST_AREA + (1 - _LEAST_AREA) * share)
        ratio = math.exp((2 * shape - 1) * math.log(_WIDEST))
        width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if width <= size[0] and height <= size[1]:
            return _placed(size, width, height, across, down), coin < 0.5
    # an image so long that no box fitted: as much of its middle as may be
    width, height = min(size[0], size[1] * _WIDEST), min(size[1], size[0] * _WIDEST)
    return _placed(size, width, height, 0.5, 0.5), coin < 0.5
