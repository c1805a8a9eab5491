"""An optimizer that was made before `apply` would train the head alone: it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import spt_kernels as spt
from spt_kernels.sensitivity import skewed_sensitivity
from tests.models import tiny_vit

IMAGES = torch.zeros(2, 3, 16, 16)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(IMAGES).square().sum().backward()
    optimizer.step()


def plan_for(model: nn.Module, structured: str | None) -> spt.Plan:
    return spt.allocate(skewed_sensitivity(model), 1500, structured=structured, rank=1)


@pytest.mark.parametrize("structured", [None, "lora", "adapter"])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, spt.SparseAdamW])
def test_an_optimizer_made_before_apply_is_refused(
    make: Callable[..., Any], structured: str | None
) -> None:
    model = tiny_vit()
    early = make(model.parameters(), lr=1e-3)
    step(model, early)  # of a plain model it is as good as any
    spt.apply(model, plan_for(model, structured))
    with pytest.raises(RuntimeError, match="made before the plan was applied"):
        step(model, early)
    late = make(model.parameters(), lr=1e-3)  # holds what is frozen besides
    step(model, late)
    step(model, torch.optim.AdamW(spt.param_groups(model)))
    spt.unload(model)
    step(model, early)


def test_where_the_head_alone_is_trained_it_does() -> None:
    model = tiny_vit()
    early = torch.optim.AdamW(model.parameters())
    spt.apply(model, spt.Plan({}, {}, {}, head=("head.weight", "head.bias")))
    before = model.head.weight.clone()
    step(model, early)
    assert not torch.equal(model.head.weight, before)
