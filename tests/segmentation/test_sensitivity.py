"""Sensitivities by losses over pixels, against plain autograd on one image at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.finetuning.base.models import ModelSource
from spt_kernels.segmentation import IGNORED, PixelLoss, Setr, build_setr
from tests.sensitivity.per_sample_truth import assert_exact

from .scenes_on_disk import TINY

Loss = Callable[[Any, Any], Tensor]


def dice(scores: Tensor, labels: Tensor) -> Tensor:
    """Soft Dice over all the pixels that it is given (Milletari et al., 2016)."""
    known = (labels != IGNORED)[:, None]
    one_hot = F.one_hot(labels.clamp(max=3), 4).movedim(-1, 1) * known
    shares = scores.softmax(1) * known
    overlap = (shares * one_hot).sum((0, 2, 3))
    return 1 - ((2 * overlap + 1) / (shares.sum((0, 2, 3)) + one_hot.sum((0, 2, 3)) + 1)).mean()


def focal(scores: Tensor, labels: Tensor) -> Tensor:
    """Focal loss, mean over the labelled pixels (Lin et al., 2017)."""
    entropy = F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="none")
    return ((1 - (-entropy).exp()) ** 2 * entropy).sum() / (labels != IGNORED).sum()


WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.0])
LOSSES: dict[str, Loss] = {
    "cross entropy": nn.CrossEntropyLoss(ignore_index=IGNORED),
    "with weights of classes": nn.CrossEntropyLoss(WEIGHTS, ignore_index=IGNORED),
    "a sum": nn.CrossEntropyLoss(ignore_index=IGNORED, reduction="sum"),
    "smoothed": nn.CrossEntropyLoss(ignore_index=IGNORED, label_smoothing=0.1),
    "a partial": functools.partial(F.cross_entropy, ignore_index=IGNORED),
    "Dice": dice,
    "focal": focal,
    "of the training": PixelLoss(0.4),
}


@pytest.fixture(scope="module")
def model() -> Setr:
    source = ModelSource("vit_tiny_patch16_224", TINY)
    made = build_setr(source, 4, 16, channels=4).model
    torch.manual_seed(1)
    with torch.no_grad():  # zeros and ones hide mistakes
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def scenes(n: int = 5) -> tuple[Tensor, Tensor]:
    """Images of which the labelled pixels are few, many, and all."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(n, 3, 16, 16, generator=generator)
    labels = torch.randint(3, (n, 16, 16), generator=generator)
    for i in range(n - 1):
        labels[i, : 15 - 4 * i] = IGNORED
    return images, labels


@pytest.mark.parametrize("name", LOSSES)
def test_each_image_counts_by_its_own_loss(name: str, model: Setr) -> None:
    images, labels = scenes()
    batches = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    found = spt.measure_sensitivity(
        model, batches, LOSSES[name], 5, head=model.trained_whole, progress=False
    )
    assert found.num_samples == 5
    assert not found.fallback, "observed in batches"
    assert found.head == tuple(
        n for n, _ in model.named_parameters() if n.startswith(model.trained_whole)
    )
    assert len(found) == 24
    assert_exact(found, model, batches, LOSSES[name])


@pytest.mark.parametrize("name", ["cross entropy", "with weights of classes", "a partial"])
def test_an_image_without_labels_counts_as_none(name: str, model: Setr) -> None:
    images, labels = scenes()
    labelled = images[[0, 2, 4]], labels[[0, 2, 4]]
    labels[[1, 3]] = IGNORED
    found = spt.measure_sensitivity(
        model, [(images, labels)], LOSSES[name], 5, head=model.trained_whole, progress=False
    )
    assert found.num_samples == 3
    assert_exact(found, model, [labelled], LOSSES[name])


def test_labels_that_do_not_fit_the_scores_are_refused(model: Setr) -> None:
    images, labels = scenes(2)
    measure = functools.partial(
        spt.measure_sensitivity, model, head=model.trained_whole, progress=False
    )
    with pytest.raises(ValueError, match=r"target: expected shape \(2, 16, 16\), got \(2, 8, 8\)"):
        measure([(images, labels[:, :8, :8])], LOSSES["cross entropy"])
    with pytest.raises(ValueError, match=r"labels from 0 to 3, .* or -100 for none .* got 255"):
        measure([(images, labels)], nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="expected a scalar, got shape"):
        measure([(images, labels)], nn.CrossEntropyLoss(ignore_index=IGNORED, reduction="none"))
