"""Batches of random squares of scenes, of which the n-th is the same however it is come by."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..finetuning.device import generator_of
from ..finetuning.images.readable import loaded
from .ade20k import LabelledScenes
from .augmentation import augmented
from .form import SceneForm
from .scenes import normalised, read_scene


class CropSet(Dataset[tuple[Tensor, Tensor]]):
    """An endless row of squares: every pass over the scenes is in an order of its own.

    What comes at a position depends on it and the seed alone, so that neither workers nor a resume
    change anything.
    """

    def __init__(self, scenes: LabelledScenes, form: SceneForm, seed: int) -> None:
        self.scenes, self.form, self.seed = scenes, form, seed
        self._pass, self._order = -1, [0]

    def scene_at(self, position: int) -> int:
        """Which scene comes at a position."""
        number, place = divmod(position, len(self.scenes))
        if number != self._pass:
            generator = generator_of(self.seed * 1_000_003 + number)
            self._order = torch.randperm(len(self.scenes), generator=generator).tolist()
            self._pass = number
        return self._order[place]

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        index = self.scene_at(position)
        path, annotation = self.scenes.paths[index], self.scenes.annotations[index]
        image, labels = read_scene(path, annotation, len(self.scenes.classes))
        generator = generator_of((self.seed + 1) * 1_000_000_007 + position)
        return augmented(image, labels, self.form, generator)


class CropBatches:
    """Batches of random squares on a device: floats `[B, 3, size, size]`, int64 `[B, size, size]`.

    Iterating gives one pass over the scenes, the first.
    """

    def __init__(
        self,
        scenes: LabelledScenes,
        form: SceneForm,
        batch_size: int,
        device: torch.device,
        *,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        self.scenes, self.batch_size, self.device = scenes, batch_size, device
        self._crops = CropSet(scenes, form, seed)
        self._workers = workers

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._at(range(len(self.scenes)))

    def between(self, first: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of these iterations, counted from 0."""
        return self._at(range(first * self.batch_size, stop * self.batch_size))

    def _at(self, positions: range) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            self._crops,
            batch_size=self.batch_size,
            sampler=positions,
            num_workers=self._workers,
            pin_memory=self.device.type == "cuda",
            # the loader draws a seed for its workers: from its own generator, not from the model's
            generator=torch.Generator().manual_seed(0),
        )
        for pixels, labels in loaded(loader):
            moved = pixels.to(self.device, non_blocking=True)
            target = labels.to(self.device, non_blocking=True).long()
            yield normalised(moved, self._crops.form), target
