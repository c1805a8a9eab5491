"""Shares by block and operation are those that one counts by hand."""

from __future__ import annotations

import pytest
import torch

from spt_kernels.plan import Plan, allocate
from spt_kernels.plots import share_by_block, share_by_operation, task_shares
from spt_kernels.plots.numbers import csv_of

from .made_up import A, B, plan, scores


def test_shares_are_counted() -> None:
    assert share_by_block(plan(A)) == {"blocks.0": 0.5, "blocks.1": 0.5, "": 0.0}
    by_operation = share_by_operation(plan(A))
    assert list(by_operation) == ["q", "k", "v", "fc1", "bias", "norm"]
    assert list(by_operation.values()) == [0, 0.4, 0, 0.5, 0.1, 0]


def test_a_sensitivity_selects_the_budget_whatever_a_module_would_cost() -> None:
    """Of a plan with a LoRA there may be more, as it pays for many entries at once."""
    measured = scores({"blocks.1.mlp.fc1.weight": list(range(20))})
    assert share_by_block(measured, 20) == {"blocks.0": 0, "blocks.1": 1, "": 0}
    with_module = allocate(measured, 20, "lora", rank=1)
    assert with_module.structured
    made = task_shares({"entries": measured}, "block", 20)
    assert made.selected == {"entries": 20}
    assert task_shares({"lora": with_module}, "block").selected["lora"] > 20


def test_several_tasks_share_places() -> None:
    made = task_shares({"a": plan(A), "b": plan(B)}, "operation")
    assert made.places == ("q", "k", "v", "fc1", "bias", "norm")
    assert made.shares == {"a": (0, 0.4, 0, 0.5, 0.1, 0), "b": (0, 0.2, 0, 0.8, 0, 0)}
    assert made.to_json()["shares"]["b"] == [0, 0.2, 0, 0.8, 0, 0]
    assert csv_of(made).splitlines()[:3] == [
        "task,operation,share,selected",
        "a,q,0.0,10",
        "a,k,0.4,10",
    ]
    assert csv_of({"MAE": made}).splitlines()[1] == "MAE,a,q,0.0,10"


def test_wrong_inputs_are_told() -> None:
    other = allocate(scores({}, {"blocks.0.mlp.fc1.weight": (4, 4)}), 3, structured=None)
    with pytest.raises(ValueError, match=r"'a' and 'b' are of different models: blocks.0.attn.qkv"):
        task_shares({"a": plan(A), "b": other}, "block")
    with pytest.raises(ValueError, match="budget: a plan has spent its own, 10, got 5"):
        task_shares({"a": plan(A)}, "block", 5)
    unmeasured = Plan({"norm.weight": torch.tensor([1])}, {}, plan(A).info)
    with pytest.raises(ValueError, match="expected a plan that a sensitivity made"):
        task_shares({"a": unmeasured}, "block")
    with pytest.raises(ValueError, match="at least one, got none"):
        task_shares({}, "block")
    with pytest.raises(ValueError, match="expected block or operation, got 'layer'"):
        task_shares({"a": plan(A)}, "layer")  # type: ignore[arg-type]
