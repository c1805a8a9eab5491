"""A segmentation model trained and tested on a (pretended) card: nothing waits for the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import spt_kernels as spt
from spt_kernels.finetuning.base.models import ModelSource
from spt_kernels.finetuning.device import pick_device
from spt_kernels.segmentation import (
    SceneForm,
    SegmentationRecipe,
    build_setr,
    evaluate_scenes,
    read_ade20k,
    train_segmentation,
)
from spt_kernels.segmentation.crops import CropBatches
from spt_kernels.segmentation.training import IterationFigures
from spt_kernels.sensitivity import skewed_sensitivity
from tests.segmentation.scenes_on_disk import TINY, write_scenes

from .graph import PretendedGraph
from .pretend import pretended_card

FORM = SceneForm((0.5,) * 3, (0.5,) * 3, 16, 11)


def _run(
    data: Path, device: str, graph: bool | None, checkpoint: Path, iterations: int = 4
) -> tuple[list[IterationFigures], float | None]:
    where = pick_device(device)
    model = build_setr(ModelSource("vit_tiny_patch16_224", TINY), 3, 16, channels=4).model
    scores = skewed_sensitivity(model, head=model.trained_whole)
    torch.manual_seed(3)
    spt.apply(model.to(where), spt.allocate(scores, 1500, rank=2))
    batches = CropBatches(read_ade20k(data, "training"), FORM, 2, where)
    history = train_segmentation(
        model,
        batches,
        SegmentationRecipe(iterations=iterations, batch_size=2, warmup_iterations=1),
        lr=1e-3,
        checkpoint=checkpoint,
        graph=graph,
        report_every=2,
    )
    seen = evaluate_scenes(model, read_ade20k(data, "validation"), FORM, where)
    return history, seen.single.pixel_accuracy


@pytest.mark.parametrize("graph", [None, False], ids=["captured", "ordinary"])
def test_iterations_are_those_of_the_cpu(tmp_path: Path, graph: bool | None) -> None:
    data = write_scenes(tmp_path / "scenes", training=3, validation=1)
    expected, accuracy = _run(data, "cpu", None, tmp_path / "cpu")
    with pretended_card(), pytest.MonkeyPatch.context() as patch:
        replays = []
        replay = PretendedGraph.replay
        patch.setattr(PretendedGraph, "replay", lambda self: (replays.append(1), replay(self)))
        found, seen = _run(data, "cuda", graph, tmp_path / "card")
        assert len(replays) == (8 if graph is None else 0)  # a backward and an update of each step
        again, _ = _run(data, "cuda", graph, tmp_path / "card")  # from its checkpoint
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-4)
    assert seen == pytest.approx(accuracy, abs=0.01)
    assert again == found
