"""What comes between the calls of a captured step: a batch that fails, deltas that change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import spt_kernels as spt
from spt_kernels.layers import sparse_deltas
from spt_kernels.step import TrainingStep, capture_step
from tests.card.pretend import pretended_card

from .runs import adamw, assert_same, batches, train, tuned


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


def test_deltas_that_are_changed_in_place_are_followed() -> None:
    results = []
    with pretended_card():
        for captured in (True, False):
            model = tuned("spt-unstructured", "cuda")
            optimizer = spt.SparseAdamW(spt.param_groups(model), lr=1e-2, capturable=True)

            @torch.no_grad()
            def change(n: int, _: object, model: torch.nn.Module = model) -> None:
                for delta in sparse_deltas(model).values() if n == 2 else ():
                    delta.delta.mul_(-20)

            data = batches(4, "cuda")
            results.append(train(captured, model, data, optimizer=optimizer, between=change))
    assert_same(*results)
