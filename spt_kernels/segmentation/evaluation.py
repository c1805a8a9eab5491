"""How well a model labels scenes: at one scale, at several, and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..finetuning.progress import Progress, Silent
from .ade20k import LabelledScenes
from .form import SceneForm
from .iou import PixelCounts
from .pictures import check_names, save_prediction
from .reading import scenes_of
from .slide import RATIOS, in_precision, label_map


@dataclass(frozen=True)
class SegmentationScores:
    """What a model reaches on scenes whose labels are known.

    Attributes:
        single: at one scale.
        multi: at several scales and mirrored, `None` where that was not asked for.
        classes: their names.
        images: how many scenes.
    """

    single: PixelCounts
    multi: PixelCounts | None
    classes: tuple[str, ...]
    images: int

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; shares in 0 to 1."""
        by_class = zip(self.classes, self.single.iou, self.single.accuracy_by_class, strict=True)
        multi = self.multi
        return {
            "miou": self.single.mean_iou,
            "pixel_accuracy": self.single.pixel_accuracy,
            "mean_accuracy": self.single.mean_accuracy,
            "miou_multi_scale": None if multi is None else multi.mean_iou,
            "pixel_accuracy_multi_scale": None if multi is None else multi.pixel_accuracy,
            "mean_accuracy_multi_scale": None if multi is None else multi.mean_accuracy,
            "images": self.images,
            "pixels": self.single.pixels,
            "classes": {name: {"iou": iou, "accuracy": own} for name, iou, own in by_class},
        }


def evaluate_scenes(
    model: nn.Module,
    scenes: LabelledScenes,
    form: SceneForm,
    device: torch.device,
    *,
    multi_scale: bool = False,
    ratios: Sequence[float] = RATIOS,
    amp: str = "none",
    save_to: Path | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> SegmentationScores:
    """Label scenes by sliding windows, in their own size, and count what is right.

    Args:
        model: gives scores per pixel; left in the mode it was in.
        scenes: with their label maps.
        form: how they are brought to the model.
        device: of the model.
        multi_scale: look at `ratios` of the usual size and the mirror images as well.
        ratios: see there.
        amp: `"none"` or `"bf16"`.
        save_to: a folder for the predicted label maps, `<image>.png`, and these laid over the
            images, `<image>-overlay.png`: those of several scales where they are looked at. Older
            files of these names are replaced.
        workers: processes that read scenes; 0 reads in this one.
        progress: told of every scene.

    Raises:
        ValueError: a scene cannot be read; or, before any is, what is written would have one name
            twice, or that of an image or a label map of `scenes`.
    """
    if save_to is not None:
        check_names(scenes.paths, save_to, besides=scenes.annotations)
    progress = progress or Silent()
    n_classes = len(scenes.classes)
    single, multi = PixelCounts(n_classes), PixelCounts(n_classes) if multi_scale else None
    scores_of = in_precision(model, device, amp)
    was_training = model.training
    model.eval()
    try:
        for path, (image, labels) in zip(scenes.paths, scenes_of(scenes, workers), strict=True):
            truth = torch.from_numpy(labels)
            predicted = label_map(scores_of, image, form, device).cpu()
            single.add(truth, predicted)
            if multi is not None:
                predicted = label_map(
                    scores_of, image, form, device, ratios=ratios, flip=True
                ).cpu()
                multi.add(truth, predicted)
            if save_to is not None:
                save_prediction(save_to, path.stem, image, predicted.numpy(), n_classes)
            progress.advance()
    finally:
        model.train(was_training)
    return SegmentationScores(single, multi, scenes.classes, len(scenes))
