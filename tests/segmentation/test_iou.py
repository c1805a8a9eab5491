"""Intersection over union, against numbers worked out by hand and against sets of pixels."""

from __future__ import annotations

import pytest
import torch

from spt_kernels.segmentation import IGNORED, PixelCounts


def test_by_hand() -> None:
    counts = PixelCounts(4)
    labels = torch.tensor([[0, 0, 0, 1], [1, IGNORED, IGNORED, 1]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 0, 1, 1], [1, 0, 2, 2]])
    counts.add(labels, predicted)
    # class 0: 2 of 3 pixels; class 1: 2 right, of 3 there and 3 taken; class 2: predicted alone
    assert counts.iou == [2 / 3, 2 / 4, 0.0, None]
    assert counts.mean_iou == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert counts.accuracy_by_class == [2 / 3, 2 / 3, None, None]
    assert counts.mean_accuracy == pytest.approx(2 / 3)
    assert counts.pixel_accuracy == 4 / 6
    assert counts.pixels == 6


def test_counts_of_images_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = PixelCounts(5)
    true: dict[int, set[tuple[int, int]]] = {c: set() for c in range(5)}
    taken: dict[int, set[tuple[int, int]]] = {c: set() for c in range(5)}
    for image in range(3):
        labels = torch.randint(5, (60,), generator=generator)
        labels[::7] = IGNORED
        predicted = torch.randint(4, (60,), generator=generator)
        counts.add(labels.view(6, 10), predicted.view(6, 10))
        for i, (own, chosen) in enumerate(zip(labels.tolist(), predicted.tolist(), strict=True)):
            if own != IGNORED:
                true[own].add((image, i))
                taken[chosen].add((image, i))
    assert counts.iou == [len(true[c] & taken[c]) / len(true[c] | taken[c]) for c in range(5)]


def test_nothing_labelled_is_no_score() -> None:
    counts = PixelCounts(2)
    counts.add(torch.full((2, 2), IGNORED), torch.zeros(2, 2, dtype=torch.int64))
    assert (counts.mean_iou, counts.pixel_accuracy, counts.mean_accuracy) == (None, None, None)
    with pytest.raises(ValueError, match=r"^predicted: expected shape \(2, 2\), got \(3,\)"):
        counts.add(torch.zeros(2, 2), torch.zeros(3))
