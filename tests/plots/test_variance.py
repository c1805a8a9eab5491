"""The variance over tasks is that of the numbers that one counts by hand."""

from __future__ import annotations

import pytest

from spt_kernels.plan import allocate
from spt_kernels.plots import variance_over_tasks
from spt_kernels.plots.numbers import csv_of

from .made_up import A, B, plan, scores


def test_variance_over_two_tasks() -> None:
    """Blocks: 50 and 20 %, 50 and 80 %: each is 15 from the mean, so 2 · 15² / (2 - 1)."""
    made = variance_over_tasks(
        {
            "supervised": {"x": plan(A), "y": plan(A), "more": plan(A)},
            "MAE": {"x": plan(A), "y": plan(B)},
        }
    )
    assert (made.tasks, made.left_out) == (("x", "y"), ("more",))
    assert made.blocks == ("blocks.0", "blocks.1", "")
    assert made.by_block["supervised"] == (0, 0, 0)
    assert made.by_block["MAE"] == pytest.approx((450, 450, 0))
    # k: 40 and 20, fc1: 50 and 80, bias: 10 and 0
    assert made.by_operation["MAE"] == pytest.approx((0, 200, 0, 450, 50, 0))
    lines = csv_of(made).splitlines()
    assert lines[0] == "pretraining,axis,place,variance"
    assert len(lines) == 1 + 2 * 3 + 2 * 6


def test_what_cannot_be_compared_is_told() -> None:
    with pytest.raises(ValueError, match="at least two tasks that all of them have, got x of x, y"):
        variance_over_tasks({"one": {"x": plan(A)}, "other": {"x": plan(A), "y": plan(B)}})
    other = allocate(scores({}, {"blocks.0.mlp.fc1.weight": (4, 4)}), 3, structured=None)
    with pytest.raises(ValueError, match="'one' and 'other' are of different architectures"):
        variance_over_tasks(
            {"one": {"x": plan(A), "y": plan(B)}, "other": {"x": other, "y": other}}
        )
    with pytest.raises(ValueError, match="at least one, got none"):
        variance_over_tasks({})
