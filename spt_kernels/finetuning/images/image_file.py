"""Files of pictures as Pillow opens them, and the one error of those that cannot be read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ...errors import needed

with needed("reading images"):
    from PIL import Image, ImageFile

# what Pillow raises for files that are damaged, of a form that it does not read, or too large
_UNREADABLE = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)
_FAILURE = "{path}: cannot read the image ({reason})"


@contextlib.contextmanager
def opened(path: Path, failure: str = _FAILURE) -> Iterator[ImageFile.ImageFile]:
    """A picture's file.

    Args:
        path: of it.
        failure: what the error says, of `path` and `reason`.

    Raises:
        ValueError: whatever goes wrong with it within; names the file.
    """
    try:
        with _begun(path) as file:
            yield file
    except _UNREADABLE as error:
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ValueError(failure.format(path=path, reason=reason)) from error


def _begun(path: Path) -> ImageFile.ImageFile:
    try:
        return Image.open(path)
    except AttributeError as error:  # Pillow's own mistake, of a damaged SPIDER image
        raise Image.UnidentifiedImageError(f"{path}: {error}") from error
