"""What a job comes to on this machine: its model and images, ready to use."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import torch

from ...distributed import Processes
from ..base.model_check import check_scores
from ..base.models import BaseModel, build, preprocessing_of
from ..device import pick_device
from ..images.labelled import LabelledImages
from ..images.pixels import Batches, PixelSet, Preprocessing
from ..images.splits import Splits, read_splits
from ..job.job import FinetuneJob
from ..progress import Progress


@dataclass(frozen=True)
class Setting:
    """What a job comes to on this machine: the model and the images, ready to use.

    Batches are this process's share of those of all `processes`.
    """

    job: FinetuneJob
    base: BaseModel
    form: Preprocessing
    splits: Splits
    device: torch.device
    workers: int
    processes: Processes = field(default_factory=Processes)

    @property
    def images_in_a_step(self) -> int:
        """Of the largest batch that comes, for one of the processes."""
        return self.job.recipe.share_of(self.processes.size, len(self.splits.train))

    def training_batches(self, progress: Progress) -> Batches:
        """Batches of the training images, shuffled and augmented by the seed."""
        return self._read(self.splits.train, self.form, self.job.recipe.seed, progress)

    def batches(self, split: str, progress: Progress) -> Batches | None:
        """Batches of `val` or `test` as they are; `None` where there are no such images."""
        images = getattr(self.splits, split)
        if images is None:
            return None
        return self._read(images, replace(self.form, augment="none"), None, progress)

    def check_readable(self, progress: Progress) -> None:
        """Read the validation and test images once; each process its share of them.

        Raises:
            ValueError: one cannot be read.
        """
        every = [s for s in (self.splits.val, self.splits.test) if s is not None]
        if every:
            images = functools.reduce(LabelledImages.joined, every)
            own = range(self.processes.rank, len(images), self.processes.size)
            PixelSet(images.take(own), self.form).check(self.workers, progress)

    def _read(
        self,
        images: LabelledImages,
        form: Preprocessing,
        shuffle_seed: int | None,
        progress: Progress,
    ) -> Batches:
        recipe = self.job.recipe
        pixels = PixelSet(images, form, recipe.seed).preload(self.workers, progress)
        return Batches(
            pixels,
            recipe.batch_size,
            self.device,
            shuffle_seed=shuffle_seed,
            workers=self.workers,
            processes=self.processes,
        )

    def notes(self) -> list[str]:
        """What of model and images is as asked for and hardly as meant."""
        train = self.splits.train
        found = []
        if self.base.weight_notes:
            found.append(f"weights: {'; '.join(self.base.weight_notes)}")
        if not self.base.head_is_new:
            found.append(
                "the head is that of the weights, as the classes are as many; "
                "--new-head (new_head=True) starts it afresh"
            )
        if self.splits.is_held_out and self.job.images.layout is not None:
            found.append(
                f"the data set has no validation images: {len(self.splits.val or ())} of those to "
                "train on are held out, whatever the seed; VPT's train.json, val.json and "
                "test.json in its folder would be read instead"
            )
        found += self.splits.overlaps()
        for count, what in ((0, "no training image"), (1, "a single training image")):
            counts = zip(train.classes, train.counts(), strict=True)
            named = [name for name, own in counts if own == count]
            if named:
                found.append(f"{what} of {_some(named)}")
        return found

    def training_notes(self) -> list[str]:
        """As `notes`, and what of the recipe is so."""
        n_images, size = len(self.splits.train), self.job.recipe.batch_size
        if size <= n_images:
            return self.notes()
        small = (
            f"a batch of {size} is more than the {n_images} training images: an epoch is one step"
        )
        return [*self.notes(), small]


def open_setting(
    job: FinetuneJob,
    device: str = "auto",
    workers: int = 0,
    processes: Processes | None = None,
) -> Setting:
    """Find the images of `job`, build its model, and check that they go together.

    Raises:
        ValueError: as `read_splits` and `build`; fewer training images than classes; a model that
            does not take such images, or does not give a score per class.
    """
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more processes, got {workers}")
    place = pick_device(device)
    splits = read_splits(job.images, job.recipe.seed)
    classes, count = splits.train.classes, job.images.train_images
    if count is not None and count < len(classes):
        raise ValueError(
            f"train_images: expected at least one of each of the {len(classes)} classes, "
            f"got {count}"
        )
    base = build(job.model, len(classes), seed=job.recipe.seed, drop_path=job.recipe.drop_path)
    form = preprocessing_of(base.model, **job.form)
    check_scores(base.model, form.image_shape, len(classes))
    return Setting(job, base, form, splits, place, workers, processes or Processes())


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more classes"
