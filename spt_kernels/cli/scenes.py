"""What commands on saved models do with one that labels pixels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command import named_of
from .options import MachineOptions, described
from .saved_options import SavedOptions
from .terminal import Terminal, count, facts, percent, table

if TYPE_CHECKING:
    from ..segmentation.evaluation import SegmentationScores
    from ..segmentation.prediction import LabelledImage
    from ..segmentation.saved import SavedSegmentation

_PIXELS = "Pixels (a model of `segment`)"


@dataclass(frozen=True)
class PixelOptions:
    """How scenes are labelled, and where the label maps go."""

    multi_scale: Annotated[
        bool, described(_PIXELS, "--multi-scale", "At six scales and mirrored as well.")
    ] = False
    save_predictions: Annotated[
        Path | None,
        described(
            _PIXELS, "--save-predictions FOLDER", "Label maps, and these laid over the images."
        ),
    ] = None


def find_segmentation(
    context: typer.Context, model: SavedOptions, path: Path, of_images: Iterable[str]
) -> SavedSegmentation | None:
    """The model at `path`, if it labels pixels.

    Args:
        context: of the command.
        model: options on the backbone, of which only the weights may be given.
        path: of a run, or a file of one.
        of_images: parameters of the command that say something of images, not of their pixels.

    Raises:
        ValueError: an option was given that is of no meaning for such a model.
    """
    from ..segmentation.saved import SavedSegmentation, is_segmentation

    labels_pixels = is_segmentation(path)
    of_pixels = [f.name for f in fields(PixelOptions)]
    if unread := named_of(context, of_images if labels_pixels else of_pixels):
        does = "labels pixels" if labels_pixels else "does not label pixels"
        raise ValueError(f"{unread[0]}: the model {does}; leave it out")
    if not labels_pixels:
        return None
    if model.model or model.model_arg or model.pretrained:
        raise ValueError("--model: the file of a model that labels pixels tells; leave it out")
    weights = None if model.weights is None else model.weights.resolve()
    return SavedSegmentation.find(path, weights=weights)


def evaluate_scenes(
    terminal: Terminal,
    saved: SavedSegmentation,
    data: Path | None,
    machine: MachineOptions,
    pixels: PixelOptions,
    *,
    amp: str | None,
    force: bool,
) -> None:
    """Load the model of a segmentation run, label its validation images, show the mIoU."""
    from ..finetuning.device import pick_device
    from ..segmentation import evaluation
    from ..segmentation.ade20k import read_ade20k
    from ..segmentation.pictures import check_folder

    labels = pixels.save_predictions
    check_folder(labels, force=force)
    root = data or saved.data
    if root is None:
        raise ValueError("--data: name the folder of the scenes")
    scenes = read_ade20k(root, "validation")
    own = saved.told.classes
    if scenes.classes != own:
        raise ValueError(
            f"--data: expected scenes of the model's {len(own)} classes, {own[0]}, {own[1]}, …, "
            f"got {len(scenes.classes)}, {scenes.classes[0]}, {scenes.classes[1]}, …"
        )
    device = pick_device(machine.device)
    model = saved.load().to(device)
    with terminal.progress() as progress:
        progress.start("evaluating", len(scenes))
        scores = evaluation.evaluate_scenes(
            model,
            scenes,
            saved.told.form,
            device,
            multi_scale=pixels.multi_scale,
            amp=saved.amp if amp is None else amp,
            save_to=labels,
            workers=machine.workers,
            progress=progress,
        )
    parts = [_table(scores), facts(_lines(scores))]
    if labels is not None:
        parts.append(f"label maps in {labels}")
    terminal.show(scores.to_json(), *parts)


def label_scenes(
    terminal: Terminal,
    saved: SavedSegmentation,
    images: list[Path],
    machine: MachineOptions,
    pixels: PixelOptions,
    *,
    amp: str | None,
    force: bool,
) -> None:
    """Load the model of a segmentation run, write label maps of images, show what is on them."""
    from ..segmentation.pictures import check_folder
    from ..segmentation.prediction import label_images

    labels = pixels.save_predictions
    if labels is None:
        raise ValueError("--save-predictions: name the folder for the label maps")
    check_folder(labels, force=force)
    with terminal.progress() as progress:
        seen = label_images(
            saved,
            images,
            labels,
            multi_scale=pixels.multi_scale,
            amp=amp,
            device=machine.device,
            workers=machine.workers,
            progress=progress,
        )
    value = {"images": [{"image": str(own.image), "shares": own.shares} for own in seen]}
    terminal.show(value, _seen_table(seen), f"label maps in {labels}")


def _lines(scores: SegmentationScores) -> list[tuple[str, str]]:
    lines = [("mIoU", percent(scores.single.mean_iou))]
    if scores.multi is not None:
        lines.append(("mIoU, multi-scale", percent(scores.multi.mean_iou)))
    return [
        *lines,
        ("mean accuracy of the classes", percent(scores.single.mean_accuracy)),
        ("pixel accuracy", percent(scores.single.pixel_accuracy)),
        ("images", count(scores.images)),
    ]


def _table(scores: SegmentationScores) -> Any:
    by_class = zip(scores.classes, scores.single.iou, scores.single.accuracy_by_class, strict=True)
    rows = [
        (name, percent(iou), percent(share))
        for name, iou, share in by_class
        if iou is not None or share is not None  # without pixels, true or predicted
    ]
    return table(("class", "IoU", "accuracy"), rows)


def _seen_table(seen: Iterable[LabelledImage]) -> Any:
    rows = []
    for own in seen:
        largest = list(own.shares.items())[:3]
        rows.append((str(own.image), ", ".join(f"{name} {percent(s)}" for name, s in largest)))
    return table(("image", "classes, by their pixels"), rows, has_prose=True)
