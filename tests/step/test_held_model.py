"""Whether a model still is what was captured of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import spt_kernels as spt
from spt_kernels.step.held_model import HeldModel

from .runs import tuned


@pytest.mark.parametrize("method", ["spt-lora", "spt-unstructured", "full"])
def test_training_changes_nothing_that_is_held(method: str) -> None:
    model = tuned(method, "cpu")
    held = HeldModel(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    if method == "full":
        model.load_state_dict(model.state_dict())
    model(torch.randn(2, 3, 16, 16))
    assert held.difference() is None


def test_whatever_is_replaced_is_named(tmp_path: Path) -> None:
    model = tuned("spt-unstructured", "cpu")
    spt.save_delta(model, tmp_path / "task")
    held = HeldModel(model)
    weight = model.head.weight
    model.head.weight = nn.Parameter(weight.detach().clone())
    assert held.difference() == "head.weight was replaced"
    model.head.weight = weight
    assert held.difference() is None
    memory = weight.data
    weight.data = memory.clone()
    assert held.difference() == "a parameter or buffer was moved or given other memory"
    weight.data = memory
    weight.requires_grad_(False)
    assert held.difference() == "head.weight required a gradient when it was captured"
    weight.requires_grad_(True)
    model.cls_token.requires_grad_(True)
    assert held.difference() == "cls_token required no gradient when it was captured"
    model.cls_token.requires_grad_(False)
    model.blocks[0].eval()
    assert "it was in training mode" in str(held.difference())
    model.train()
    spt.unload(model)
    assert "was replaced" in str(held.difference())
    spt.load_delta(model, tmp_path / "task")  # with layers of its own
    assert "was replaced" in str(held.difference())


def test_positions_that_are_loaded_into_a_layer_are_noticed() -> None:
    model = tuned("spt-unstructured", "cpu")
    held = HeldModel(model)
    state = model.state_dict()
    name = next(name for name in state if name.endswith(".index") and len(state[name]) > 1)
    state[name] = state[name] + 1
    model.load_state_dict(state)
    assert "_spt_pattern was replaced" in str(held.difference())
