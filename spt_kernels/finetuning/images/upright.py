"""Photographs as they are looked at, and not as the camera was held."""

from __future__ import annotations

from ...errors import needed

with needed("reading images"):
    from PIL import ExifTags, Image, ImageFile

_TURNS = {  # by what EXIF calls the orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turn_of(file: ImageFile.ImageFile) -> Image.Transpose | None:
    """What makes an image upright, None where it is; reads all of it.

    Pillow's `exif_transpose` writes all other metadata anew, and fails where a camera's are odd.
    """
    file.load()  # what a PNG tells may come after its pixels
    return _TURNS.get(file.getexif().get(ExifTags.Base.Orientation, 1))


def turned(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    """The image after what `turn_of` has told."""
    return image if turn is None else image.transpose(turn)


def upright(file: ImageFile.ImageFile) -> Image.Image:
    """An image as it is looked at."""
    return turned(file, turn_of(file))
