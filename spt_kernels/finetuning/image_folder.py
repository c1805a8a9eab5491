"""Images found in a folder per class, as torchvision's ImageFolder, hidden things left aside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .images import LabelledImages

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_LEFT_BEHIND = {"__MACOSX", "@eaDir"}  # by archives of macOS, by a Synology's previews


def read_folder(root: str | os.PathLike[str], *, allow_empty: bool = False) -> LabelledImages:
    """Read one split in torchvision's ImageFolder layout: a folder per class, images at any depth.

    What is hidden, its name beginning with a dot, is no class, folder or image. Linked folders are
    followed, those that lead back to themselves once.

    Args:
        root: the folder.
        allow_empty: whether classes without an image are as if they were not there.

    Raises:
        ValueError: `root` is no folder, holds no class folder, or a class has no image.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"no such folder: {root}")
    named = sorted(entry.name for entry in root.iterdir() if _is_shown(entry) and entry.is_dir())
    if not named:
        raise ValueError(f"{root}: expected one folder per class, found none{_loose(root)}")
    found = {name: sorted(_images_below(root / name, (_identity(root),))) for name in named}
    empty = [name for name in named if not found[name]]
    if len(empty) == len(named) or (empty and not allow_empty):
        others = f" (and {len(empty) - 1} more folders)" if len(empty) > 1 else ""
        raise ValueError(
            f"{root / empty[0]}{others}: no images ({', '.join(SUFFIXES[:3])} …); "
            "a folder that is no class must be moved out"
        )
    classes = tuple(name for name in named if found[name])
    paths = [path for name in classes for path in found[name]]
    labels = [label for label, name in enumerate(classes) for _ in found[name]]
    return LabelledImages(tuple(paths), tuple(labels), classes)


def _images_below(folder: Path, inside: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Images in a folder at any depth; `inside` are the folders on the way to it."""
    identity = _identity(folder)
    if identity in inside:
        return  # a link back to where it is
    for entry in folder.iterdir():
        if not _is_shown(entry):
            continue
        if entry.is_dir():
            yield from _images_below(entry, (*inside, identity))
        elif entry.suffix.lower() in SUFFIXES:
            yield entry


def _identity(folder: Path) -> tuple[int, int]:
    state = folder.stat()
    return state.st_dev, state.st_ino


def _is_shown(entry: Path) -> bool:
    return not entry.name.startswith(".") and entry.name not in _LEFT_BEHIND


def _loose(root: Path) -> str:
    """A word where the images lie in the folder itself."""
    loose = [p for p in root.iterdir() if _is_shown(p) and p.suffix.lower() in SUFFIXES]
    return f" but {len(loose)} images that are in no folder" if loose else ""
