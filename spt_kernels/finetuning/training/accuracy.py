"""How often a model is right."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...distributed import Processes
from ..device import autocast


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy on a set of images.

    Attributes:
        correct: images whose class got the highest score.
        total: images seen.
        loss: mean cross entropy.
        correct_by_class: per class.
        total_by_class: per class.
        predictions: for each image the class with the highest score, in the order of the images.
        labels: for each image its own class.
    """

    correct: int
    total: int
    loss: float
    correct_by_class: tuple[int, ...]
    total_by_class: tuple[int, ...]
    predictions: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def top1(self) -> float:
        """Share in 0 to 1."""
        return self.correct / self.total

    @property
    def by_class(self) -> tuple[float | None, ...]:
        """Share in 0 to 1 of each class, `None` of one without images."""
        pairs = zip(self.correct_by_class, self.total_by_class, strict=True)
        return tuple(right / total if total else None for right, total in pairs)

    @property
    def class_mean(self) -> float:
        """Mean over the classes that have images: each counts alike, however many they are."""
        known = [share for share in self.by_class if share is not None]
        return sum(known) / len(known)

    def taken_for(self) -> list[tuple[int, int, int]]:
        """Class, the class that it was taken for, and of how many images; the most images first."""
        pairs = Counter(zip(self.labels, self.predictions, strict=True))
        return sorted(
            ((label, chosen, count) for (label, chosen), count in pairs.items()),
            key=lambda row: (-row[2], row[0], row[1]),
        )

    def confusion(self) -> list[list[int]]:
        """How many images of each class (row) were taken for each class (column).

        The square of the classes; of very many, `taken_for` says as much in less.
        """
        n_classes = len(self.total_by_class)
        pairs = torch.tensor(self.labels) * n_classes + torch.tensor(self.predictions)
        counts = pairs.bincount(minlength=n_classes**2).view(n_classes, n_classes)
        return counts.tolist()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    amp: str = "none",
    on_batch: Callable[[int], object] | None = None,
    processes: Processes | None = None,
) -> Accuracy:
    """Measure the accuracy of `model`, which is left in the mode it was in.

    Args:
        model: gives scores `[B, classes]`.
        batches: images and labels, on the model's device.
        amp: `"none"` or `"bf16"`.
        on_batch: called with the number of images after each batch.
        processes: that share the images: `batches` are this one's, of which image `i` of all is on
            rank `i % size`. Each of them gets the accuracy on all.

    Raises:
        ValueError: there are no batches.
        FloatingPointError: scores are NaN, of which none is the highest.
        OtherProcessFailed: either, in all processes but the first.
    """
    was_training = model.training
    model.eval()
    loss = 0.0
    predicted: list[Tensor] = []
    seen: list[Tensor] = []
    classes = 0
    try:
        for images, labels in batches:
            with autocast(images.device, amp):
                scores = model(images).float()
            loss += float(F.cross_entropy(scores, labels, reduction="sum"))
            classes = scores.shape[1]
            predicted.append(scores.argmax(1).cpu())
            seen.append(labels.cpu())
            if on_batch is not None:
                on_batch(len(labels))
    finally:
        model.train(was_training)
    own = _Seen(loss, classes, torch.cat(predicted or [_NONE]), torch.cat(seen or [_NONE]))
    processes = processes or Processes()
    parts = processes.gather(own)
    return processes.together(lambda: _accuracy_on(parts))


def no_scores(where: str) -> FloatingPointError:
    """What to raise where scores are NaN, so that none is the highest."""
    return FloatingPointError(
        f"the model's scores are nan on {where}: its training has diverged, or it overflows in "
        "this precision"
    )


_NONE = torch.empty(0, dtype=torch.int64)


class _Seen(NamedTuple):
    """What one process has seen: summed loss, number of classes, int64 `[images]` of each."""

    loss: float
    classes: int
    predicted: Tensor
    labels: Tensor


def _accuracy_on(parts: list[_Seen]) -> Accuracy:
    """On the images of all processes, dealt out to them in turn."""
    loss, classes = sum(part.loss for part in parts), max(part.classes for part in parts)
    n_images = sum(len(part.labels) for part in parts)
    if not n_images:
        raise ValueError("batches: expected at least one, got none")
    if math.isnan(loss):
        raise no_scores(f"some of {n_images:,} images")
    labels, chosen = torch.empty(2, n_images, dtype=torch.int64)
    for rank, part in enumerate(parts):
        chosen[rank :: len(parts)], labels[rank :: len(parts)] = part.predicted, part.labels
    hits = chosen == labels
    by_class = labels.bincount(minlength=classes)
    right_by_class = labels[hits].bincount(minlength=classes)
    return Accuracy(
        correct=int(hits.sum()),
        total=len(labels),
        loss=loss / len(labels),
        correct_by_class=tuple(right_by_class.tolist()),
        total_by_class=tuple(by_class.tolist()),
        predictions=tuple(chosen.tolist()),
        labels=tuple(labels.tolist()),
    )
