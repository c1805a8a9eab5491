"""The table of a plan is no wider than asked, and blocks come by their numbers."""

from __future__ import annotations

import pytest
import torch

import spt_kernels as spt
from spt_kernels.plan.table import in_numeric_order


def plan_of(names: list[str]) -> spt.Plan:
    scores = {name: torch.arange(1.0, 13.0).reshape(3, 4) for name in names}
    return spt.allocate(spt.Sensitivity.from_tensors(scores, 2), 9 * len(names), structured=None)


BLOCKS = [f"stages.{s}.blocks.{b}" for s in range(2) for b in range(2)]
MANY = [f"{block}.conv_{operation}.weight" for block in BLOCKS for operation in "abcdefgh"]


@pytest.mark.parametrize("width", [80, 60, 40])
def test_a_wide_table_is_broken_between_its_columns(width: int) -> None:
    plan = plan_of(MANY)
    whole = plan.summary(width=500).splitlines()
    lines = plan.summary(width=width).splitlines()
    assert max(map(len, whole)) > 90
    assert max(map(len, lines)) <= width
    heads = [line.split() for line in lines if line.startswith("block ")]
    rows = [line.split() for line in lines if line.startswith("stages.1.blocks.0 ")]
    assert len(heads) == len(rows) > 1
    (head,) = [line.split() for line in whole if line.startswith("block ")]
    (row,) = [line.split() for line in whole if line.startswith("stages.1.blocks.0 ")]
    assert [head[0], *(word for part in heads for word in part[1:])] == head
    assert [row[0], *(word for part in rows for word in part[1:])] == row


def test_a_summary_fits_a_terminal_by_default() -> None:
    text = plan_of(MANY).summary()
    assert max(map(len, text.splitlines())) <= 80


def test_blocks_come_by_their_numbers_whatever_the_order_of_names() -> None:
    # as a safetensors file has them
    plan = plan_of(sorted(f"blocks.{i}.mlp.fc1.weight" for i in range(12)))
    expected = [f"blocks.{i}" for i in range(12)]
    assert [block for block, _ in plan.cells()] == expected
    shown = [line.split()[0] for line in plan.summary().splitlines() if line.startswith("blocks.")]
    assert shown == expected


def test_only_numbers_are_put_in_order() -> None:
    names = ["stem", "encoder.2", "encoder.10.a", "decoder.1", "encoder.1", "encoder.10", "stem"]
    assert in_numeric_order(names) == [
        *("stem", "encoder.1", "encoder.2", "encoder.10.a", "encoder.10", "decoder.1"),
    ]
    swin = ["layers.0.blocks.0", "layers.1", "layers.1.blocks.0", ""]
    assert in_numeric_order(swin) == swin
