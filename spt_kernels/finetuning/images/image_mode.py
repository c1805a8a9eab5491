"""An image of any mode in eight bits a channel: scaled by the range of its mode, or refused."""

from __future__ import annotations

import numpy as np

from ...errors import needed

with needed("reading images"):
    from PIL import Image, ImageFile

_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262  # tags; the second is 0 where zero is white
_PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")


def in_eight_bits(image: Image.Image, file: ImageFile.ImageFile, mode: str) -> Image.Image:
    """Convert to `"RGB"` or `"L"`, black and white staying what they are.

    Modes of eight bits or fewer go as Pillow takes them: a palette is looked up, transparency is
    dropped, as every loader of training images does. Sixteen bits are scaled by their range, or
    that of the twelve bits that a TIFF says it has. Floats are taken as 0 for black to 1 for white.

    Args:
        image: the pixels.
        file: what they were read from, which knows their depth.
        mode: `"RGB"` or `"L"`.

    Raises:
        ValueError: the mode has no range that tells what is white, or its values are outside of it.
    """
    if image.mode in _PLAIN:
        return image.convert(mode)
    values = np.asarray(image)
    if image.mode == "F":
        if not (values >= 0).all() or not (values <= 1).all():  # NaN is neither
            raise ValueError(
                f"floats are taken as 0 (black) to 1 (white), this has {values.min():.6g} to "
                f"{values.max():.6g}: scale it, or convert it to 8 or 16 bits"
            )
        white = 1.0
    elif image.mode.startswith("I;16") or _is_sixteen_bits(image, file):
        white = _white_of_sixteen(file)
        if values.min() < 0 or values.max() > white:
            raise ValueError(
                f"expected values of 0 to {white:.0f}, this has {values.min()} to {values.max()}"
            )
    elif image.mode == "I":
        raise ValueError(
            "integers of 32 bits (mode I) have no range that tells what is white: convert it to "
            "8 or 16 bits"
        )
    else:
        raise ValueError(f"mode {image.mode} is not read: convert it to RGB")
    grey = np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8)
    if _zero_is_white(file):
        grey = 255 - grey
    return Image.fromarray(grey).convert(mode)


def _is_sixteen_bits(image: Image.Image, file: ImageFile.ImageFile) -> bool:
    # Pillow holds these in 32 bits: of a PGM always, of a PNG in its older versions
    return image.mode == "I" and file.format in ("PNG", "PPM")


def _white_of_sixteen(file: ImageFile.ImageFile) -> float:
    bits = getattr(file, "tag_v2", {}).get(_TIFF_BITS, (16,))
    return float(2 ** (bits[0] if isinstance(bits, tuple) else bits) - 1)


def _zero_is_white(file: ImageFile.ImageFile) -> bool:
    return getattr(file, "tag_v2", {}).get(_TIFF_PHOTOMETRIC, 1) == 0
