"""The picture of a plan shows what the numbers say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from spt_kernels.plan import Plan, allocate
from spt_kernels.plan.figure import sensitivity_figure
from spt_kernels.sensitivity import Sensitivity
from tests.pictures import assert_a_picture, texts


def sensitivity() -> Sensitivity:
    """Ten high scores: 4 in the k rows of block 0, 5 in fc1 of block 1, 1 in a norm outside."""
    scores = {
        "blocks.0.attn.qkv.weight": torch.full((12, 4), 0.1),
        "blocks.1.mlp.fc1.weight": torch.full((8, 4), 0.1),
        "blocks.1.mlp.fc1.bias": torch.full((8,), 0.1),
        "norm.weight": torch.full((4,), 0.1),
    }
    scores["blocks.0.attn.qkv.weight"][4, :] = 5.0
    scores["blocks.1.mlp.fc1.weight"].view(-1)[:5] = 5.0
    scores["norm.weight"][2] = 5.0
    return Sensitivity.from_tensors(scores, 3)


def plan() -> Plan:
    return allocate(sensitivity(), 10, "adapter", rank=1)


def test_sensitivity_figure_shows_the_shares(tmp_path: Path) -> None:
    figure = sensitivity_figure(plan())
    heat, above, beside = figure.axes
    assert [label.get_text() for label in heat.get_yticklabels()] == [
        *("q", "k", "v", "fc1", "bias", "norm")
    ]
    assert [label.get_text() for label in heat.get_xticklabels()] == ["0", "1", "rest"]
    assert [bar.get_height() for bar in above.patches] == pytest.approx([40, 50, 10])
    assert [bar.get_width() for bar in beside.patches] == pytest.approx([0, 40, 0, 50, 0, 10])
    in_cells = {text.get_position(): text.get_text() for text in heat.texts}
    assert in_cells == {
        **{(0, 0): "0", (0, 1): "40", (0, 2): "0"},
        **{(1, 3): "50", (1, 4): "0", (2, 5): "10"},
    }
    assert "10 most sensitive" in figure.get_suptitle()
    assert_a_picture(figure, tmp_path / "sensitivity.png")


def test_sensitivity_figure_marks_what_is_structured() -> None:
    scores = sensitivity()
    scores["blocks.0.attn.qkv.weight"][4:8, :] = 5.0
    structured = allocate(scores, 19, "adapter", rank=1)
    assert structured.structured
    figure = sensitivity_figure(structured)
    triangles = [patch for patch in figure.axes[0].patches if len(patch.get_xy()) == 4]
    assert len(triangles) == 1
    assert "Adapter" in figure.get_suptitle()
    assert "Adapter" not in sensitivity_figure(plan()).get_suptitle()


def test_sensitivity_figure_of_scores() -> None:
    by_plan, by_scores = sensitivity_figure(plan()), sensitivity_figure(sensitivity(), 10)
    assert texts(by_plan) == texts(by_scores)
    with pytest.raises(ValueError, match="budget must be given"):
        sensitivity_figure(sensitivity())


def test_sensitivity_figure_needs_counts() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        sensitivity_figure(Plan({}, {}, plan().info))
