"""When the steps of a run are captured, and what the ordinary one computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from spt_kernels.finetuning.job.recipe import Recipe
from spt_kernels.finetuning.progress import Silent
from spt_kernels.finetuning.training.run_step import RunStep, classification_loss, wants_graph
from tests.models import tiny_batch, tiny_vit

CPU, CARD = torch.device("cpu"), torch.device("cuda:0")


def test_graphs_are_for_cards() -> None:
    assert [wants_graph(None, device) for device in (CPU, CARD)] == [False, True]
    assert [wants_graph(False, device) for device in (CPU, CARD)] == [False, False]
    assert wants_graph(True, CARD)
    with pytest.raises(ValueError, match="graph: CUDA graphs need a CUDA device, got cpu"):
        wants_graph(True, CPU)


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_the_loss_is_that_of_the_recipe(amp: str) -> None:
    model, (images, labels) = tiny_vit(depth=1).train(), tiny_batch()
    recipe = Recipe(batch_size=4, label_smoothing=0.2, amp=amp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss_fn = classification_loss(recipe.label_smoothing)
    step = RunStep(model, optimizer, recipe, None, CPU, Silent(), loss_fn)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
        scores = model(images)
    expected = F.cross_entropy(scores.float(), labels, label_smoothing=0.2)
    assert torch.equal(step(images, labels), expected.detach())
