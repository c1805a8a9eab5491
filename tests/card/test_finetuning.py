"""The training loop with its data, checkpoints and validation on a (pretended) card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import spt_kernels as spt
from spt_kernels.finetuning.device import pick_device
from spt_kernels.finetuning.images.pixels import Batches, PixelSet, Preprocessing
from spt_kernels.finetuning.job.recipe import Recipe
from spt_kernels.finetuning.progress import Silent
from spt_kernels.finetuning.training.loop import EpochFigures, train
from spt_kernels.sensitivity import skewed_sensitivity
from tests.models import tiny_vit

from .graph import PretendedGraph
from .on_card import CARD
from .pretend import pretended_card


def _batches(device: torch.device) -> Batches:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (12, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.randint(5, (12,), generator=generator)
    form = Preprocessing(16, (0.5,) * 3, (0.5,) * 3)
    data = PixelSet.from_tensors(pixels, labels, [str(i) for i in range(5)], form)
    return Batches(data, 8, device, shuffle_seed=0)


class _Lines(Silent):
    """What a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def _run(
    model: nn.Module,
    is_tuned: bool,
    epochs: int,
    device: str,
    checkpoint: Path,
    graph: bool | None = None,
    lines: _Lines | None = None,
    stop: int | None = None,
) -> list[EpochFigures]:
    def on_epoch(rows: list[EpochFigures]) -> None:
        if len(rows) - 1 == stop:
            raise InterruptedError("stopped by the test")

    where = pick_device(device)
    model.to(where)
    torch.manual_seed(3)
    if is_tuned:
        spt.apply(model, spt.allocate(skewed_sensitivity(tiny_vit()), 400))
    recipe = Recipe(epochs=epochs, batch_size=8, clip_grad=1.0)
    data = _batches(where)
    return train(
        model,
        data,
        recipe,
        lr=1e-3,
        val=data,
        checkpoint=checkpoint,
        checkpoint_seconds=0,
        on_epoch=on_epoch,
        graph=graph,
        progress=lines or Silent(),
    )


@pytest.mark.parametrize("graph", [None, False], ids=["captured", "ordinary"])
@pytest.mark.parametrize("is_tuned", [True, False], ids=["tuned", "whole"])
def test_epochs_are_those_of_the_cpu(tmp_path: Path, is_tuned: bool, graph: bool | None) -> None:
    expected = _run(tiny_vit(), is_tuned, 2, "cpu", tmp_path / "cpu")
    with pretended_card(), pytest.MonkeyPatch.context() as patch:
        replays = []
        replay = PretendedGraph.replay
        patch.setattr(PretendedGraph, "replay", lambda self: (replays.append(1), replay(self)))
        model, lines = tiny_vit(), _Lines()
        found = _run(model, is_tuned, 2, "cuda", tmp_path / "card", graph, lines)
        assert all(p.device == CARD for p in model.parameters())
        assert not lines.lines
        # of two batches an epoch the last has no graph for its backward
        assert len(replays) == (6 if graph is None else 0)
        again = _run(tiny_vit(), is_tuned, 2, "cuda", tmp_path / "card")  # from its checkpoint
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-4)
        assert ours.val_loss == pytest.approx(theirs.val_loss, rel=1e-4)
    assert [row.train_loss for row in again] == [row.train_loss for row in found]


@pytest.mark.parametrize("graph", [None, False], ids=["captured", "ordinary"])
def test_a_stopped_run_goes_on(tmp_path: Path, graph: bool | None) -> None:
    with pretended_card():
        whole, again = tiny_vit(), tiny_vit()
        expected = _run(whole, True, 3, "cuda", tmp_path / "whole", graph)
        with pytest.raises(InterruptedError):
            _run(tiny_vit(), True, 3, "cuda", tmp_path / "parts", graph, stop=1)
        found = _run(again, True, 3, "cuda", tmp_path / "parts", graph)
        assert [row.train_loss for row in found] == [row.train_loss for row in expected]
        for (name, one), other in zip(whole.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(one, other), name
        # and goes on the other way
        with pytest.raises(InterruptedError):
            _run(tiny_vit(), True, 3, "cuda", tmp_path / "other", graph, stop=1)
        other_way = False if graph is None else None
        found = _run(tiny_vit(), True, 3, "cuda", tmp_path / "other", other_way)
        losses = [row.train_loss for row in found]
        assert losses == pytest.approx([row.train_loss for row in expected], rel=1e-4)


def test_too_few_images_for_a_batch_run_without(tmp_path: Path) -> None:
    with pretended_card():
        lines = _Lines()
        recipe = Recipe(epochs=1, batch_size=16)
        data = Batches(_batches(CARD).pixels, 16, CARD)
        train(tiny_vit().to("cuda"), data, recipe, lr=1e-3, progress=lines)
        assert lines.lines == ["steps run without CUDA graphs: no batch of 16 images comes"]


def test_a_step_that_cannot_be_captured_runs_without(tmp_path: Path) -> None:
    with pretended_card():
        model, lines = tiny_vit(), _Lines()
        model.head.register_forward_hook(lambda *_: None)
        _run(model, False, 1, "cuda", tmp_path / "one", None, lines)
        (line,) = lines.lines
        assert line.startswith("steps run without CUDA graphs: head has a hook")
        with pytest.raises(ValueError, match=r"^graph: the step cannot be captured: head"):
            _run(model, False, 1, "cuda", tmp_path / "other", True)
