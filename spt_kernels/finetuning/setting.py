"""What a job comes to on this machine: its model and images, ready to use."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..sensitivity import Sensitivity, measure_sensitivity
from .device import pick_device, seed_everything
from .job import FinetuneJob
from .models import BaseModel, build, preprocessing_of
from .pixels import Batches, PixelSet, Preprocessing
from .progress import Progress
from .splits import Splits, read_splits


@dataclass(frozen=True)
class Setting:
    """What a job comes to on this machine: the model and the images, ready to use."""

    job: FinetuneJob
    base: BaseModel
    form: Preprocessing
    splits: Splits
    device: torch.device
    workers: int

    def batches(self, split: str, progress: Progress, *, train: bool = False) -> Batches | None:
        """Batches of `train`, `val` or `test`; only training batches are shuffled and augmented."""
        images = getattr(self.splits, split)
        if images is None:
            return None
        form = self.form if train else replace(self.form, augment="none")
        pixels = PixelSet(images, form, self.job.recipe.seed).preload(self.workers, progress)
        seed = self.job.recipe.seed if train else None
        size = self.job.recipe.batch_size
        return Batches(pixels, size, self.device, shuffle_seed=seed, workers=self.workers)


def open_setting(job: FinetuneJob, device: str = "auto", workers: int = 0) -> Setting:
    """Find the images of `job` and build its model; see `read_splits` and `build` for errors."""
    place = pick_device(device)
    splits = read_splits(job.images, job.recipe.seed)
    base = build(
        job.model, len(splits.train.classes), seed=job.recipe.seed, drop_path=job.recipe.drop_path
    )
    return Setting(job, base, preprocessing_of(base.model, **job.form), splits, place, workers)


def sensitivity_of(setting: Setting, progress: Progress) -> Sensitivity:
    """Measure the sensitivities of the setting's model on its training images, onto the CPU."""
    batches = setting.batches("train", progress, train=True)
    assert batches is not None
    samples = min(setting.job.method.samples, len(batches.pixels))
    seed_everything(setting.job.recipe.seed)
    progress.start("measuring sensitivity", samples)
    seen = 0

    def on_samples(done: int, _total: int) -> None:
        nonlocal seen
        progress.advance(done - seen)
        seen = done

    model = setting.base.model.to(setting.device)
    head = setting.job.method.head
    measured = measure_sensitivity(
        model, batches, num_samples=samples, head=head, progress=on_samples
    )
    model.to("cpu")
    return replace(measured, scores={name: score.cpu() for name, score in measured.items()})
