"""Overlaps of identical, disjoint and random selections, against hand counts and brute force."""

from __future__ import annotations

import json
import random

import pytest
import torch

from spt_kernels.plan import allocate
from spt_kernels.plots import selection_overlap
from spt_kernels.plots.numbers import csv_of

from .made_up import A, B, plan, scores


def test_two_tasks_counted_by_hand() -> None:
    made = selection_overlap({"a": plan(A), "b": plan(B)})
    [pair] = made.pairs
    assert (pair.first_selected, pair.second_selected, pair.shared) == (10, 10, 5)
    assert pair.jaccard == pytest.approx(5 / 15)
    # k is 4 × 4, fc1 8 × 4: of 4 and 2 of 16, of 5 and 8 of 32
    by_chance = 4 * 2 / 16 + 5 * 8 / 32
    assert pair.by_chance == pytest.approx(by_chance)
    assert pair.chance == pytest.approx(by_chance / (20 - by_chance))
    assert pair.over_chance == pytest.approx((5 / 15) / (by_chance / (20 - by_chance)))
    at = {(o.parameter, o.operation): (o.first_selected, o.second_selected, o.shared)
          for o in made.matrices}  # fmt: skip
    assert at == {
        ("blocks.0.attn.qkv.weight", "k"): (4, 2, 2),
        ("blocks.0.attn.qkv.bias", "q"): (1, 0, 0),
        ("blocks.1.mlp.fc1.weight", "fc1"): (5, 8, 3),
    }


def test_identical_and_disjoint_selections() -> None:
    disjoint = {"blocks.0.attn.qkv.weight": [20, 21, 22], "norm.weight": [1, 2]}
    made = selection_overlap({"a": plan(A), "same": plan(A), "apart": plan(disjoint)})
    same, apart, _ = made.pairs
    assert (same.jaccard, apart.jaccard) == (1, 0)
    assert same.over_chance is not None
    assert same.over_chance > 1
    assert apart.over_chance == 0  # both have some in k
    none = selection_overlap({"a": plan(A), "n": plan({"norm.weight": [0]})})
    assert none.pairs[0].over_chance is None  # no matrix has both


def test_random_selections_are_as_alike_as_chance() -> None:
    """The mean over draws of what is shared; also, what is shared is counted by sets."""
    draw = random.Random(0)
    shapes = {"blocks.0.mlp.fc1.weight": (32, 32), "blocks.0.mlp.fc2.weight": (32, 32)}
    tasks, chosen = {}, {}
    for name in map(str, range(8)):
        high = {"blocks.0.mlp.fc1.weight": draw.sample(range(1024), 200),
                "blocks.0.mlp.fc2.weight": draw.sample(range(1024), 50)}  # fmt: skip
        chosen[name] = {(matrix, p) for matrix, each in high.items() for p in each}
        tasks[name] = allocate(scores(high, shapes), 250, structured=None)
    made = selection_overlap(tasks)
    for pair in made.pairs:
        assert pair.shared == len(chosen[pair.first] & chosen[pair.second])
        assert pair.by_chance == pytest.approx(200 * 200 / 1024 + 50 * 50 / 1024)
    mean = sum(pair.shared for pair in made.pairs) / len(made.pairs)
    assert mean == pytest.approx(made.pairs[0].by_chance, rel=0.1)


def test_numbers_are_written() -> None:
    made = selection_overlap({"a": plan(A), "b": plan(B)})
    value = made.to_json()
    assert json.loads(json.dumps(value)) == value
    assert value["pairs"][0]["jaccard"] == pytest.approx(1 / 3)
    lines = csv_of(made).splitlines()
    assert lines[0].startswith("first,second,parameter,operation,first_selected")
    assert len(lines) == 1 + 1 + 3


def test_a_plan_that_does_not_hold_its_selection_is_refused() -> None:
    measured = scores({"blocks.1.mlp.fc1.weight": list(range(20))})
    with_module = allocate(measured, 20, "lora", rank=1)
    with pytest.raises(ValueError, match=r"the plan of 'b' does not hold the \d+ positions"):
        selection_overlap({"a": plan(A), "b": with_module})
    assert selection_overlap({"a": measured, "b": measured}, 20).pairs[0].jaccard == 1
    with pytest.raises(ValueError, match="at least two to compare, got 1"):
        selection_overlap({"a": plan(A)})


def test_positions_of_fused_rows_are_told_apart() -> None:
    """The same columns in q and in k are different entries."""
    q = plan({"blocks.0.attn.qkv.weight": [0, 1]})
    k = plan({"blocks.0.attn.qkv.weight": [16, 17]})
    assert torch.equal(q.unstructured["blocks.0.attn.qkv.weight"], torch.tensor([0, 1]))
    [pair] = selection_overlap({"q": q, "k": k}).pairs
    assert (pair.shared, pair.by_chance) == (0, 0)
