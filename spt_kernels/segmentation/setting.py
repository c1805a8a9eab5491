"""What a segmentation job comes to on this machine: its model and scenes, ready to use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..finetuning.device import pick_device
from ..finetuning.preparation.measured import dated, evidence_of
from ..finetuning.progress import Progress
from ..finetuning.run.same_inputs import IMAGES, WEIGHTS, told_of_images, told_of_weights
from ..methods import Method
from .ade20k import LabelledScenes, hold_out, read_ade20k
from .base_model import SegmentationModel, build_setr
from .crops import CropBatches
from .description import KIND, SegmentationDescription
from .form import SceneForm
from .job import SegmentationJob
from .reading import check_scenes


@dataclass(frozen=True)
class SegmentationSetting:
    """What a job comes to on this machine.

    Attributes:
        job: what was asked for.
        base: the model before tuning.
        form: what happens to the pixels.
        training: the scenes to train on.
        held_out: those to choose by, which are not trained on; `None` for none.
        validation: those to test on, once, at the end.
        device: where it runs.
        workers: processes that read scenes.
    """

    job: SegmentationJob
    base: SegmentationModel
    form: SceneForm
    training: LabelledScenes
    held_out: LabelledScenes | None
    validation: LabelledScenes
    device: torch.device
    workers: int

    def crops(self) -> CropBatches:
        """Batches of random squares of the training scenes, by the seed."""
        recipe = self.job.recipe
        return CropBatches(
            self.training,
            self.form,
            recipe.batch_size,
            self.device,
            seed=recipe.seed,
            workers=self.workers,
        )

    def files(self) -> list[Path]:
        """All images and label maps."""
        every = [s for s in (self.training, self.held_out, self.validation) if s is not None]
        return [path for scenes in every for path in (*scenes.paths, *scenes.annotations)]

    def check_readable(self, progress: Progress) -> None:
        """Read every scene once, or of very many how its files begin.

        Raises:
            ValueError: one cannot be read, or of those that are held out none has a label.
        """
        if not check_scenes(self.validation, self.workers, progress):
            progress.say("no pixel of the validation images has a label: there will be no mIoU")
        if self.held_out is not None and not check_scenes(self.held_out, self.workers, progress):
            raise ValueError(no_label_held_out(self.held_out))
        check_scenes(self.training, self.workers, progress)

    def evidence(self, method: Method) -> dict[str, Any]:
        """All that a measured sensitivity depends on."""
        scenes = self.training
        files = [dated(scenes.paths), dated(scenes.annotations), scenes.classes]
        recipe = self.job.recipe
        return evidence_of(
            self.job.model,
            self.base.model,
            method,
            files,
            self.form.to_json(),
            recipe.batch_size,
            recipe.seed,
            self.device,
        )

    def description(self, method: Method | None = None) -> SegmentationDescription:
        """What a file that is saved tells of itself; the method, if that is needed to read it."""
        return SegmentationDescription(
            self.job.model,
            self.training.classes,
            self.form,
            self.job.channels,
            self.base.model.auxiliary,
            method,
        )

    def config(self) -> dict[str, Any]:
        """All that it takes to build the run's model and to go on with the run."""
        told = {"job": self.job.to_json(), **self.description().to_json()}
        images = told_of_images(*map(_named, (self.training, self.held_out)))
        weights = told_of_weights(self.job.model, self.base.model.backbone)
        inputs = {IMAGES: images, WEIGHTS: weights}
        return {"kind": KIND, **told, **inputs, "version": __version__}


def no_label_held_out(scenes: LabelledScenes) -> str:
    """Why nothing can be chosen by the scenes that are held out."""
    return f"val_share: no pixel of the {len(scenes)} images that are held out has a label"


def _named(scenes: LabelledScenes | None) -> list[str]:
    return [] if scenes is None else [path.name for path in scenes.paths]


def open_segmentation(
    job: SegmentationJob, device: str = "auto", workers: int = 0
) -> SegmentationSetting:
    """Find the scenes of `job`, build its model, and check that they go together.

    Raises:
        ValueError: as `read_ade20k`, `build_setr` and `SceneForm`.
    """
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more processes, got {workers}")
    place = pick_device(device)
    training, validation = (read_ade20k(job.data, name) for name in ("training", "validation"))
    recipe = job.recipe
    training, held_out = hold_out(training, job.val_share, recipe.seed)
    base = build_setr(
        job.model,
        len(training.classes),
        job.size,
        channels=job.channels,
        auxiliary=job.auxiliary,
        seed=recipe.seed,
        drop_path=recipe.drop_path,
    )
    assert job.stride is not None  # made when the job was
    form = SceneForm(job.mean or base.mean, job.std or base.std, job.size, job.stride)
    return SegmentationSetting(job, base, form, training, held_out, validation, place, workers)
