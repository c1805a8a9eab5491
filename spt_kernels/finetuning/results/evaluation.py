"""How often a saved model is right on images whose classes are known."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...methods.method import check_one_of
from ..base.models import preprocessing_of
from ..device import pick_device
from ..images.labelled import LabelledImages, read_list
from ..images.pixels import Batches, PixelSet, Preprocessing
from ..images.splits import read_test_folder, read_test_images
from ..job.recipe import PRECISIONS
from ..progress import Progress, Silent
from ..run.saved_run import SavedRun
from ..training.accuracy import Accuracy, evaluate


def evaluate_saved(
    saved: SavedRun,
    images: LabelledImages,
    *,
    form: dict[str, Any] | None = None,
    batch_size: int = 64,
    amp: str | None = None,
    device: str = "auto",
    workers: int = 0,
    progress: Progress | None = None,
) -> Accuracy:
    """Load a saved model and measure its accuracy on `images`.

    Args:
        saved: what to load.
        images: labelled in the order of the head; `images_of` finds such.
        form: fields of `Preprocessing` that are not to be the saved ones.
        batch_size: images at a time.
        amp: `"none"` or `"bf16"`; `None` is the precision that the run was tested in.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        workers: processes that decode images; 0 decodes in this one.
        progress: told how far it is.

    Raises:
        ValueError: an option is none of these, an image cannot be read, or as `SavedRun.load`.
    """
    progress = progress or Silent()
    place = pick_device(device)
    amp = saved.amp if amp is None else amp
    check_options(batch_size, amp)
    model = saved.load().to(place)
    pixels = PixelSet(images, inference_form(saved, model, form)).preload(workers, progress)
    batches = Batches(pixels, batch_size, place, workers=workers)
    progress.start("evaluating", len(images))
    return evaluate(model, batches, amp=amp, on_batch=progress.advance)


def images_of(
    saved: SavedRun,
    root: str | os.PathLike[str] | None = None,
    file: str | os.PathLike[str] | None = None,
    classes: Sequence[str] = (),
) -> LabelledImages:
    """Images to evaluate a saved model on, labelled in the order of its head, by name.

    Args:
        saved: of which model.
        root: a folder with `test/`, or itself with a folder per class; by default the run's.
        file: a list of `path label` lines, the paths starting from `root`; by default the run's.
        classes: look at the images of these classes alone. Where the model does not tell its
            classes these are they, in the order of the head; else any order will do.

    Raises:
        ValueError: the images are of other classes than the model, or are not there.
    """
    source = saved.job.images if saved.job is not None else None
    if root is not None:
        images = read_test_folder(root) if file is None else read_list(file, root)
    elif source is None:
        raise ValueError("data: name the folder of the images")
    else:
        images = read_test_images(source) if file is None else read_list(file, source.root)
    if not saved.classes:
        return _by_place(saved, images, tuple(classes))
    is_part = root is None and file is None and source is not None and bool(source.classes)
    return _by_name(saved.classes, images, tuple(classes), is_part=is_part)


def inference_form(
    saved: SavedRun, model: Any, changed: dict[str, Any] | None = None
) -> Preprocessing:
    """The preprocessing for a saved model: as it was trained, or else the architecture's own."""
    own = saved.form or preprocessing_of(model)
    form = preprocessing_of(model, **{**vars(own), **(changed or {}), "augment": "none"})
    if len(form.mean) != len(own.mean):
        raise ValueError(
            f"mean, std: expected {len(own.mean)} values each, one per channel that the model "
            f"takes, got {len(form.mean)}"
        )
    return form


def check_options(batch_size: int, amp: str) -> None:
    """Refuse what no forward can be made with, before any work."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected more than zero, got {batch_size}")
    check_one_of("amp", amp, PRECISIONS)


def _by_name(
    names: Sequence[str], images: LabelledImages, wanted: Sequence[str], is_part: bool
) -> LabelledImages:
    """Images labelled by `names`: of the classes that are wanted, or all; `is_part` of them."""
    for name in wanted:
        if name not in names:
            raise ValueError(f"classes: {name!r} is not among the model's: {_listed(names)}")
    present = [name for name, n in zip(images.classes, images.counts(), strict=True) if n]
    absent = [name for name in wanted if name not in present]
    if absent:
        raise ValueError(f"classes: the data has no image of {_listed(absent)}")
    unknown = [name for name in present if name not in names]
    if unknown and not wanted and not is_part:
        both = [name for name in names if name in present]
        hint = f"; name the classes to look at, {','.join(both)}, to leave them out" if both else ""
        raise ValueError(
            f"data: the model does not know {_listed(unknown)}, only {_listed(names)}{hint}"
        )
    place = {name: i for i, name in enumerate(names) if name in (wanted or names)}
    kept = [i for i, label in enumerate(images.labels) if images.classes[label] in place]
    taken = images.take(kept)
    labels = tuple(place[images.classes[label]] for label in taken.labels)
    return replace(taken, labels=labels, classes=tuple(names))


def _by_place(saved: SavedRun, images: LabelledImages, classes: tuple[str, ...]) -> LabelledImages:
    """For a model that does not tell its classes: the data's, or those named, are taken for it."""
    if classes and len(classes) != saved.num_classes:
        raise ValueError(f"classes: the head has {saved.num_classes}, got {len(classes)}")
    images = images.restrict(classes) if classes else images
    if len(images.classes) != saved.num_classes:
        raise ValueError(
            f"data: the head has {saved.num_classes} classes, the data {len(images.classes)}; "
            "name the head's, in its order, with classes"
        )
    return images


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown}, … ({len(names)})"
