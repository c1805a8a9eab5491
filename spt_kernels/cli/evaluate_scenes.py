"""What `spt-kernels evaluate` does with a model that labels pixels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import MachineOptions
from .terminal import Terminal, count, facts, percent, table

if TYPE_CHECKING:
    from ..segmentation.evaluation import SegmentationScores
    from ..segmentation.saved import SavedSegmentation


def evaluate_scenes(
    terminal: Terminal,
    saved: SavedSegmentation,
    data: Path | None,
    machine: MachineOptions,
    *,
    amp: str,
    multi_scale: bool,
    save_predictions: Path | None,
) -> None:
    """Load the model of a segmentation run, label its validation images, show the mIoU."""
    from ..finetuning.device import pick_device
    from ..segmentation import evaluation
    from ..segmentation.ade20k import read_ade20k

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
            multi_scale=multi_scale,
            amp=amp,
            save_to=save_predictions,
            progress=progress,
        )
    parts = [_table(scores), facts(_lines(scores))]
    if save_predictions is not None:
        parts.append(f"label maps in {save_predictions}")
    terminal.show(scores.to_json(), *parts)


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
    rows = [(name, percent(iou), percent(share)) for name, iou, share in by_class]
    return table(("class", "IoU", "accuracy"), rows)
