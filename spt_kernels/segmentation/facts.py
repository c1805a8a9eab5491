"""What a segmentation run tells of itself: what is trained, and in how much memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..finetuning.run.facts import accounted_device, parameters_of
from ..memory import estimate_memory
from ..methods import Method
from ..methods.tunable import Tunable
from ..plan import Plan
from ..recomputation import blocks_by
from ..recomputation.conditions import NotRecomputable
from .ade20k import NAMES, maps_without_image
from .loss import PixelLoss
from .setting import SegmentationSetting


def facts_of(
    setting: SegmentationSetting, plan: Plan | None, head: tuple[str, ...]
) -> dict[str, Any]:
    """What is trained, on what; told from the plain model."""
    return {
        **parameters_of(setting.base.model, plan, head),
        "head": list(head),
        "lr": setting.job.recipe.peak_lr(setting.job.method),
        "training_images": len(setting.training),
        "validation_images": 0 if setting.held_out is None else len(setting.held_out),
    }


def trains(method: Method, tunable: Tunable, plan: Plan | None, facts: dict[str, Any]) -> str:
    """What the method trains and its share of the model, as a line."""
    share = 100 * tunable.trained / facts["backbone_parameters"]
    line = (
        f"{method.name} trains {tunable.trained:,} parameters, {share:.2f} % of the backbone, and "
        f"the decoder of {facts['head_parameters']:,}"
    )
    return f"{line}; {plan.shortfall}" if plan is not None and plan.shortfall else line


def notes_of(setting: SegmentationSetting) -> list[str]:
    """What is as asked for and hardly as meant."""
    notes = []
    if setting.base.weight_notes:
        notes.append(f"weights: {'; '.join(setting.base.weight_notes)}")
    if setting.job.recipe.batch_size > len(setting.training):
        notes.append(
            f"a batch of {setting.job.recipe.batch_size} is more than the "
            f"{len(setting.training)} training images"
        )
    data = Path(setting.job.data)
    for split in ("training", "validation"):
        if lone := maps_without_image(data, split):
            notes.append(
                f"label maps in annotations/{split} without an image are left out: {len(lone):,}, "
                f"as {lone[0]}"
            )
    if not (data / NAMES).is_file():
        notes.append(
            f"there is no {NAMES} to name the classes: they are ADE20K's "
            f"{len(setting.training.classes)}, by number"
        )
    return notes


def accounted_bytes(
    setting: SegmentationSetting, model: nn.Module, recompute: str | None = None
) -> int:
    """The peak of a training step of `model`, whose loss is over every pixel.

    Args:
        setting: of the run.
        model: plain or tuned.
        recompute: what it is to compute again; left out, what it does so already.

    Raises:
        ValueError: what it computes again cannot be, which a rehearsal alone can tell.
    """
    recipe, size = setting.job.recipe, setting.job.size
    loss_fn = PixelLoss(recipe.auxiliary_weight)

    def loss_of(outputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        labels = outputs[0].new_zeros((len(outputs[0]), size, size), dtype=torch.long)
        return loss_fn(outputs, labels)

    try:
        return estimate_memory(
            model,
            (recipe.batch_size, 3, size, size),
            loss_fn=loss_of,
            dtype="bf16-autocast" if recipe.amp == "bf16" else "fp32",
            recompute=None if recompute is None else blocks_by(model, recompute),
            device=accounted_device(setting.device),
        ).peak_bytes
    except NotRecomputable as reason:
        raise ValueError(f"recompute: {reason}") from reason
