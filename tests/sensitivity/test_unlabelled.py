"""Targets that say "no label", for some positions of a sample or for all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt
from spt_kernels.sensitivity.per_sample import batches as batches_module
from spt_kernels.sensitivity.per_sample.losses import PerSampleLoss
from tests.sensitivity.per_sample_truth import assert_exact

CLASSES = 3


def segmenter() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, CLASSES, 1)
    ).eval()


def pictures(n: int = 6, *, ignored: int, void: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Images, and masks whose first rows have no label, and some of which have none at all."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, 8, 8, generator=generator)
    masks = torch.randint(CLASSES, (n, 8, 8), generator=generator)
    masks[:, :2] = ignored
    masks[list(void)] = ignored
    return images, masks


def with_255(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, ignore_index=255)


def constant_without_labels(output: Tensor, target: Tensor) -> Tensor:
    valid = target != 255
    if not valid.any():
        return output.new_zeros(())
    return F.cross_entropy(output.movedim(1, -1)[valid], target[valid])


LOSSES: dict[str, tuple[Any, int]] = {
    "cross_entropy": (F.cross_entropy, -100),
    "module": (nn.CrossEntropyLoss(ignore_index=255), 255),
    "module-sum": (nn.CrossEntropyLoss(ignore_index=255, reduction="sum"), 255),
    "class-weights": (
        nn.CrossEntropyLoss(ignore_index=255, weight=torch.tensor([0.2, 1.0, 3.0])),
        255,
    ),
    "nll": (nn.NLLLoss(ignore_index=255), 255),
    "function": (with_255, 255),
    "constant": (constant_without_labels, 255),
}


@pytest.mark.parametrize("void", [(), (0, 1, 4)], ids=["none", "first-two"])
@pytest.mark.parametrize("loss", LOSSES)
def test_scores_are_those_of_the_samples_with_labels(loss: str, void: tuple[int, ...]) -> None:
    loss_fn, ignored = LOSSES[loss]
    images, masks = pictures(ignored=ignored, void=void)
    batches = [(images[:4], masks[:4]), (images[4:], masks[4:])]
    model = segmenter()
    sensitivity = spt.measure_sensitivity(model, batches, loss_fn, include=["*"], progress=False)
    valid = [i for i in range(6) if i not in void]
    assert sensitivity.num_samples == len(valid)
    assert_exact(sensitivity, model, [(images[valid], masks[valid])], loss_fn)


@pytest.mark.parametrize("loss", ["cross_entropy", "module", "module-sum"])
def test_targets_on_a_card_are_looked_at_with_their_loss(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # where the host would have to wait for the card
    monkeypatch.setattr(PerSampleLoss, "labelled", lambda self, target, batch: None)
    loss_fn, ignored = LOSSES[loss]
    images, masks = pictures(ignored=ignored, void=(0, 1, 4))
    model = segmenter()
    sensitivity = spt.measure_sensitivity(model, [(images, masks)], loss_fn, progress=False)
    assert (sensitivity.num_samples, sensitivity.fallback) == (3, ())
    assert_exact(sensitivity, model, [(images[[2, 3, 5]], masks[[2, 3, 5]])], loss_fn)
    labels = torch.where(torch.arange(6) % 2 == 0, ignored, 1)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    sensitivity = spt.measure_sensitivity(classifier, [(images, labels)], loss_fn, progress=False)
    assert (sensitivity.num_samples, sensitivity.fallback) == (3, ())
    assert_exact(sensitivity, classifier, [(images[1::2], labels[1::2])], loss_fn)


def through_matmul(loss_fn: Callable[..., Tensor]) -> tuple[nn.Module, Callable[..., Tensor]]:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 6)
            self.last = nn.Linear(6, CLASSES)
            self.mix = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x.movedim(1, -1)).tanh() @ self.mix
            return self.last(y).movedim(-1, 1)

    torch.manual_seed(0)
    return Product(), loss_fn


@pytest.mark.parametrize("exclude", [(), ("first.*", "last.*")], ids=["beside-others", "alone"])
@pytest.mark.parametrize("loss", ["cross_entropy", "function", "constant"])
def test_what_is_measured_one_by_one_leaves_them_out_too(
    loss: str, exclude: tuple[str, ...]
) -> None:
    loss_fn, ignored = LOSSES[loss]
    images, masks = pictures(ignored=ignored, void=(3,))
    model, loss_fn = through_matmul(loss_fn)
    sensitivity = spt.measure_sensitivity(
        model, [(images, masks)], loss_fn, include=["mix"], exclude=exclude, progress=False
    )
    assert sensitivity.fallback == ("mix",)
    assert sensitivity.num_samples == 5
    valid = [0, 1, 2, 4, 5]
    assert_exact(sensitivity, model, [(images[valid], masks[valid])], loss_fn)


@pytest.mark.parametrize("loss", ["module", "function", "constant"])
def test_another_sample_is_drawn_in_the_place_of_each(loss: str) -> None:
    loss_fn, ignored = LOSSES[loss]
    images, masks = pictures(ignored=ignored, void=(0, 1, 2))
    drawn: list[int] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, 6, 2):
            drawn.append(i)
            yield images[i : i + 2], masks[i : i + 2]

    reports: list[tuple[int, int]] = []
    model = segmenter()
    sensitivity = spt.measure_sensitivity(
        model, batches(), loss_fn, 2, progress=lambda *report: reports.append(report)
    )
    assert sensitivity.num_samples == 2
    assert drawn == [0, 2, 4]
    assert reports == [(1, 2), (2, 2)]
    assert_exact(sensitivity, model, [(images[3:5], masks[3:5])], loss_fn)


@pytest.mark.parametrize("loss", ["module", "function", "constant"])
@pytest.mark.parametrize("void", [(0, 1, 3), (0,), (1, 4)], ids=str)
def test_what_is_cut_off_a_batch_is_drawn_first(loss: str, void: tuple[int, ...]) -> None:
    loss_fn, ignored = LOSSES[loss]
    images, masks = pictures(ignored=ignored, void=void)
    model, drawn = segmenter(), []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in (0, 5):
            drawn.append(start)
            yield images[start : start + 5], masks[start : start + 5]

    sensitivity = spt.measure_sensitivity(model, batches(), loss_fn, 2, progress=False)
    valid = [i for i in range(6) if i not in void][:2]
    assert (sensitivity.num_samples, drawn) == (2, [0])
    assert_exact(sensitivity, model, [(images[valid], masks[valid])], loss_fn)


def test_labels_of_images_may_be_ignored_as_well() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    images, labels = pictures(ignored=0)[0], torch.tensor([0, 1, -100, 2, -100, 1])
    sensitivity = spt.measure_sensitivity(model, [(images, labels)], progress=False)
    assert sensitivity.num_samples == 4
    valid = [0, 1, 3, 5]
    assert_exact(sensitivity, model, [(images[valid], labels[valid])])


@pytest.mark.parametrize("endless", [False, True])
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("module", "target: none of .* samples has a label: .* ignore_index"),
        ("function", "loss is nan in batch .* expected at least one with a valid label"),
        ("constant", "loss_fn constant_without_labels: the loss does not depend on the model"),
    ],
)
def test_no_label_anywhere_is_an_error(
    loss: str, message: str, endless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "_PATIENCE", 8)
    loss_fn, ignored = LOSSES[loss]
    batch = pictures(2, ignored=ignored, void=(0, 1))
    batches = itertools.repeat(batch) if endless else [batch, batch]
    with pytest.raises(ValueError, match=message):
        spt.measure_sensitivity(segmenter(), batches, loss_fn, 6, progress=False)


def test_a_label_out_of_range_is_still_refused_and_none_is_told_of() -> None:
    images, masks = pictures(ignored=255)
    masks[0, 5, 5] = 7
    loss_fn = nn.CrossEntropyLoss(ignore_index=255)
    with pytest.raises(ValueError, match=r"labels from 0 to 2.* or 255 for none.* got 7"):
        spt.measure_sensitivity(segmenter(), [(images, masks)], loss_fn, progress=False)
    masks[0, 5, 5] = -100
    with pytest.raises(ValueError, match=r"labels from 0 to 2.* got -100"):
        spt.measure_sensitivity(segmenter(), [(images, masks)], loss_fn, progress=False)


def test_a_nan_of_the_model_or_of_the_data_is_no_missing_label() -> None:
    images, masks = pictures(ignored=255)
    images[1] = float("nan")
    with pytest.raises(ValueError, match="the loss is nan in batch 0"):
        spt.measure_sensitivity(segmenter(), [(images, masks)], with_255, progress=False)
    images, _ = pictures(ignored=255)
    target = torch.randn(6, CLASSES, 8, 8)
    target[5, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="the loss is nan in batch 0"):
        spt.measure_sensitivity(segmenter(), [(images, target)], F.mse_loss, progress=False)
