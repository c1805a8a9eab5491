"""An optimizer of before the model was tuned as it is would train the head alone: it is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
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


@pytest.mark.parametrize(
    ("make", "structured", "set_to_none"),
    [
        (torch.optim.AdamW, None, True),
        (torch.optim.AdamW, "adapter", False),
        (spt.SparseAdamW, "lora", True),
        (spt.SparseAdamW, None, False),
    ],
)
def test_an_optimizer_of_dropped_parameters_is_refused(
    make: Callable[..., Any], structured: str | None, set_to_none: bool
) -> None:
    model = tiny_vit()
    plan = plan_for(model, structured)
    spt.apply(model, plan)
    of_before = make(spt.param_groups(model))
    step(model, of_before)
    step(model, of_before)
    spt.unload(model)
    step(model, of_before)  # of a plain model, of which it trains the head
    spt.apply(model, plan)
    of_before.zero_grad(set_to_none)
    model(IMAGES).square().sum().backward()
    with pytest.raises(RuntimeError, match="made for another task: what it trained in VisionT"):
        of_before.step()
    held = {id(p) for group in of_before.param_groups for p in group["params"]}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
    of_before.add_param_group({"params": trained})
    step(model, of_before)


def test_an_optimizer_of_before_a_switch_is_refused(tmp_path: Path) -> None:
    model = tiny_vit()
    spt.apply(model, plan_for(model, "lora"))
    spt.save_delta(model, tmp_path / "lora.safetensors")
    spt.unload(model)
    spt.apply(model, plan_for(model, None))
    optimizer = torch.optim.AdamW(spt.param_groups(model))
    step(model, optimizer)
    spt.load_delta(model, tmp_path / "lora.safetensors")
    with pytest.raises(RuntimeError, match="made for another task"):
        step(model, optimizer)
    optimizer = torch.optim.AdamW(spt.param_groups(model))
    spt.load_delta(model, tmp_path / "lora.safetensors")  # the same layers: it still holds them
    step(model, optimizer)
    spt.unload(model)
    spt.apply(model, spt.Plan({}, {}, {}, head=("head.weight", "head.bias")))
    step(model, optimizer)  # it holds all that is trained now
