"""What a saved model sees on images whose classes are not known."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..device import autocast, pick_device
from ..images.labelled import SUFFIXES, LabelledImages, images_below
from ..images.pixels import Batches, PixelSet
from ..progress import Progress, Silent
from ..run.saved_run import SavedRun
from ..training.accuracy import no_scores
from .evaluation import check_options, inference_form


@dataclass(frozen=True)
class Prediction:
    """What is on one image.

    Attributes:
        image: the file.
        classes: the most probable first.
        probabilities: of these classes, in 0 to 1; of all classes they sum to 1.
    """

    image: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(
    saved: SavedRun,
    images: Sequence[str | os.PathLike[str]],
    *,
    top: int = 1,
    classes: Sequence[str] = (),
    form: dict[str, Any] | None = None,
    batch_size: int = 64,
    amp: str | None = None,
    device: str = "auto",
    workers: int = 0,
    progress: Progress | None = None,
) -> list[Prediction]:
    """Name the most probable classes of images.

    Args:
        saved: which model; `SavedRun.find` finds it.
        images: files, and folders, whose images are taken at any depth.
        top: how many classes of each image, or all where there are fewer.
        classes: names in the order of the head, where the model does not tell them; their numbers
            from 0 stand for them by default.
        form: fields of `Preprocessing` that are not to be the saved ones.
        batch_size: images at a time.
        amp: `"none"` or `"bf16"`; `None` is the precision that the run was tested in.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        workers: processes that decode images; 0 decodes in this one.
        progress: told how far it is.

    Raises:
        ValueError: an option is none of these, there is no image or one that cannot be read, or as
            `SavedRun.load`.
        FloatingPointError: scores are NaN.
    """
    progress = progress or Silent()
    place = pick_device(device)
    amp = saved.amp if amp is None else amp
    check_options(batch_size, amp)
    if top < 1:
        raise ValueError(f"top: expected at least 1, got {top}")
    names = _names(saved, classes)
    paths = find_images(images)
    model = saved.load().to(place).eval()
    unlabelled = LabelledImages(paths, (0,) * len(paths), names)
    pixels = PixelSet(unlabelled, inference_form(saved, model, form)).preload(workers, progress)
    progress.start("predicting", len(paths))
    best: list[Any] = []  # values and places
    with torch.inference_mode():
        for batch, _ in Batches(pixels, batch_size, place, workers=workers):
            with autocast(place, amp):
                scores = model(batch)
            shares = scores.float().softmax(1).cpu()
            if shares.isnan().any():
                raise no_scores("some of the images")
            best.append(shares.sort(dim=1, descending=True, stable=True))
            progress.advance(len(batch))
    shares, places = (torch.cat(part)[:, :top].tolist() for part in zip(*best, strict=True))
    return [
        Prediction(path, tuple(names[i] for i in place), tuple(share))
        for path, place, share in zip(paths, places, shares, strict=True)
    ]


def find_images(given: Iterable[str | os.PathLike[str]]) -> tuple[Path, ...]:
    """Files as they are named, and those in folders as `images_below` finds them, by name.

    Raises:
        ValueError: there is no such file, or a folder without images.
    """
    found: dict[Path, None] = {}  # a file that is named twice is one image
    for path in map(Path, given):
        if path.is_dir():
            inside = sorted(images_below(path))
            if not inside:
                raise ValueError(f"{path}: no images ({', '.join(SUFFIXES[:3])} …)")
            found |= dict.fromkeys(inside)
        elif path.is_file():
            found[path] = None
        else:
            raise ValueError(f"no such file or folder: {path}")
    if not found:
        raise ValueError("images: expected at least one, got none")
    return tuple(found)


def as_csv(predictions: Iterable[Prediction]) -> str:
    """A line per image and class: `image,rank,class,probability`, under a line that says so."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "rank", "class", "probability"))
    for seen in predictions:
        pairs = zip(seen.classes, seen.probabilities, strict=True)
        for rank, (name, share) in enumerate(pairs, start=1):
            writer.writerow((seen.image, rank, name, f"{share:.6f}"))
    return text.getvalue()


def _names(saved: SavedRun, classes: Sequence[str]) -> tuple[str, ...]:
    if saved.classes:
        if classes and tuple(classes) != saved.classes:
            raise ValueError(f"classes: the model tells its own, {', '.join(saved.classes)}")
        return saved.classes
    if classes and len(classes) != saved.num_classes:
        raise ValueError(f"classes: the head has {saved.num_classes}, got {len(classes)}")
    return tuple(classes) or tuple(str(i) for i in range(saved.num_classes))
