"""A batch that fails in a captured step, beside a graph that goes on, is part of no update."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spt_kernels.step import TrainingStep, capture_step
from tests.card.pretend import pretended_card

from .runs import adamw, batches, tuned


def loss_fn(output: Tensor, labels: Tensor) -> Tensor:
    if len(labels) == 3:
        raise torch.OutOfMemoryError
    return F.cross_entropy(output, labels)


@pytest.mark.parametrize("captured", [True, False])
def test_the_next_update_is_of_the_batches_that_follow(captured: bool) -> None:
    with pretended_card():
        model, twin = tuned("full", "cuda"), tuned("full", "cuda")
        first, second, third = batches(3, "cuda")
        ragged = batches(1, "cuda", last=3)[0]
        optimizer, twins_own = adamw(model), adamw(twin)
        for group in twins_own.param_groups:
            group["lr"] = torch.tensor(group["lr"], device="cuda")
        step = TrainingStep(model, loss_fn, optimizer, accumulate=2)
        if captured:
            step = capture_step(  # type: ignore[assignment]
                model, loss_fn, optimizer, first, accumulate=2, ragged="eager"
            )
        step(*first)
        with pytest.raises(torch.OutOfMemoryError):
            step(*ragged)
        twins_step = TrainingStep(twin, loss_fn, twins_own, accumulate=2)
        for batch in (second, third):
            step(*batch)
            twins_step(*batch)
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine.cpu(), theirs.cpu())
