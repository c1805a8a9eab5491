"""Scenes one after the other, by as many processes as are to read them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import needed
from ..finetuning.images.readable import check_readable, read_in_order
from ..finetuning.progress import Progress
from .ade20k import IGNORED, LabelledScenes
from .scenes import glance_at_scene, read_image, read_scene

with needed("reading images"):
    from PIL import Image


def scenes_of(scenes: LabelledScenes, workers: int = 0) -> Iterator[tuple[Image.Image, np.ndarray]]:
    """Each image with its label map, in order; errors as `read_scene`."""
    return read_in_order(_pairs(scenes), functools.partial(_scene, len(scenes.classes)), workers)


def images_of(paths: Sequence[Path], workers: int = 0) -> Iterator[Image.Image]:
    """Each image, in order; errors as `read_image`."""
    return read_in_order(paths, read_image, workers)


def check_scenes(scenes: LabelledScenes, workers: int, progress: Progress) -> bool:
    """Read every scene once, or of very many how its files begin, and keep none.

    Returns:
        Whether a pixel of them may have a label: of very many nobody has looked.

    Raises:
        ValueError: as `read_scene`.
    """
    read = functools.partial(_is_labelled, len(scenes.classes))
    pairs = _pairs(scenes)
    return any(check_readable(pairs, read, _glanced_at, workers, progress, "checking scenes"))


def _pairs(scenes: LabelledScenes) -> list[tuple[Path, Path]]:
    return list(zip(scenes.paths, scenes.annotations, strict=True))


def _scene(num_classes: int, pair: tuple[Path, Path]) -> tuple[Image.Image, np.ndarray]:
    return read_scene(*pair, num_classes)


def _is_labelled(num_classes: int, pair: tuple[Path, Path]) -> bool:
    _, labels = read_scene(*pair, num_classes)
    return bool((labels != IGNORED).any())


def _glanced_at(pair: tuple[Path, Path]) -> bool:
    glance_at_scene(*pair)
    return True
