"""The training loop with its data, checkpoints and validation on a (pretended) card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import spt_kernels as spt
from spt_kernels.finetuning.device import pick_device
from spt_kernels.finetuning.pixels import Batches, PixelSet, Preprocessing
from spt_kernels.finetuning.recipe import Recipe
from spt_kernels.finetuning.training import EpochFigures, train
from spt_kernels.sensitivity import skewed_sensitivity
from tests.models import tiny_vit

from .on_card import CARD
from .pretend import pretended_card


def _batches(device: torch.device) -> Batches:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (12, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.randint(5, (12,), generator=generator)
    form = Preprocessing(16, (0.5,) * 3, (0.5,) * 3)
    data = PixelSet.from_tensors(pixels, labels, [str(i) for i in range(5)], form)
    return Batches(data, 8, device, shuffle_seed=0)


def _run(
    model: nn.Module, is_tuned: bool, epochs: int, device: str, checkpoint: Path
) -> list[EpochFigures]:
    where = pick_device(device)
    model.to(where)
    torch.manual_seed(3)
    if is_tuned:
        spt.apply(model, spt.allocate(skewed_sensitivity(tiny_vit()), 400))
    recipe = Recipe(epochs=epochs, batch_size=8, clip_grad=1.0)
    data = _batches(where)
    return train(model, data, recipe, lr=1e-3, val=data, checkpoint=checkpoint)


@pytest.mark.parametrize("is_tuned", [True, False], ids=["tuned", "whole"])
def test_epochs_are_those_of_the_cpu(tmp_path: Path, is_tuned: bool) -> None:
    expected = _run(tiny_vit(), is_tuned, 2, "cpu", tmp_path / "cpu")
    with pretended_card():
        model = tiny_vit()
        found = _run(model, is_tuned, 2, "cuda", tmp_path / "card")
        assert all(p.device == CARD for p in model.parameters())
        again = _run(tiny_vit(), is_tuned, 2, "cuda", tmp_path / "card")  # from its checkpoint
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-4)
        assert ours.val_loss == pytest.approx(theirs.val_loss, rel=1e-4)
    assert [row.train_loss for row in again] == [row.train_loss for row in found]
