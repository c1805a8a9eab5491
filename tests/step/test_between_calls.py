"""What comes between the calls of a captured step: a batch that fails, deltas that change."""

from __future__ import annotations

from typing import Any

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


def in_place(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for delta in sparse_deltas(model).values():
            delta.delta.mul_(-20)


def by_a_state_dict(model: torch.nn.Module) -> None:
    state = model.state_dict()
    model.load_state_dict({n: -20 * t if "delta" in n else t.clone() for n, t in state.items()})


@pytest.mark.parametrize("method", ["spt-unstructured", "spt-lora"])
@pytest.mark.parametrize("change", [in_place, by_a_state_dict])
def test_deltas_that_are_changed_are_followed(change: Any, method: str) -> None:
    results = []
    with pretended_card():
        for captured in (True, False):
            model = tuned(method, "cuda")
            optimizer = spt.SparseAdamW(spt.param_groups(model), lr=1e-2, capturable=True)

            def between(n: int, _: object, model: torch.nn.Module = model) -> None:
                if n == 2:
                    change(model)

            data = batches(4, "cuda")
            results.append(train(captured, model, data, optimizer=optimizer, between=between))
    assert_same(*results)
