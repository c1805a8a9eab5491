"""How well predicted label maps cover the true ones: intersection over union."""

from __future__ import annotations

import torch
from torch import Tensor

from .ade20k import IGNORED


class PixelCounts:
    """How many pixels of each class were taken for each class.

    Attributes:
        counts: int64 `[true class, predicted class]`.
    """

    def __init__(self, num_classes: int) -> None:
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def add(self, labels: Tensor, predicted: Tensor) -> None:
        """Count the pixels of one image.

        Args:
            labels: integers of any shape, a class or `IGNORED`, which is left out.
            predicted: of the same shape, a class.
        """
        if labels.shape != predicted.shape:
            raise ValueError(
                f"predicted: expected shape {tuple(labels.shape)}, got {tuple(predicted.shape)}"
            )
        n = len(self.counts)
        kept = labels != IGNORED
        pairs = labels[kept].long() * n + predicted[kept].long()
        self.counts += pairs.bincount(minlength=n * n).view(n, n).cpu()

    @property
    def pixels(self) -> int:
        """How many were counted."""
        return int(self.counts.sum())

    @property
    def iou(self) -> list[float | None]:
        """Of each class, in 0 to 1; `None` where it is neither there nor predicted."""
        hits, true, taken = self._sums()
        unions = [t + p - h for h, t, p in zip(hits, true, taken, strict=True)]
        return [h / u if u else None for h, u in zip(hits, unions, strict=True)]

    @property
    def accuracy_by_class(self) -> list[float | None]:
        """Share of the pixels of each class that are right; `None` where there are none."""
        hits, true, _ = self._sums()
        return [h / t if t else None for h, t in zip(hits, true, strict=True)]

    @property
    def mean_iou(self) -> float | None:
        """Over the classes that have one: the mIoU."""
        return _mean(self.iou)

    @property
    def mean_accuracy(self) -> float | None:
        """Over the classes that are there."""
        return _mean(self.accuracy_by_class)

    @property
    def pixel_accuracy(self) -> float | None:
        """Share of all labelled pixels that are right."""
        return int(self.counts.diagonal().sum()) / self.pixels if self.pixels else None

    def _sums(self) -> tuple[list[int], list[int], list[int]]:
        """Of each class: the pixels that are right, that are of it, that were taken for it."""
        counts = self.counts
        return counts.diagonal().tolist(), counts.sum(1).tolist(), counts.sum(0).tolist()


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
