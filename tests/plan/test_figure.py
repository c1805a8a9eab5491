"""The picture of a plan shows what the numbers say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from spt_kernels.plan import Plan, allocate
from spt_kernels.plan.figure import sensitivity_figure
from spt_kernels.sensitivity import Sensitivity
from tests.pictures import assert_a_picture, assert_nothing_is_cut, texts, titles


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
    assert heat.get_ylabel() == "operation"
    assert heat.get_xlabel() == "block"
    assert [title.split("\n")[0] for title in titles(figure)] == [
        *("", "% in each block", "% in each operation")
    ]
    first, second = figure.get_suptitle().split("\n")
    assert first == "Where the 10 most sensitive of 92 parameters lie (10.9 %)"
    assert second == "trained: 10 (10.9 %)"
    assert_nothing_is_cut(figure)
    assert_a_picture(figure, tmp_path / "sensitivity.png")


def test_sensitivity_figure_marks_what_is_structured() -> None:
    scores = sensitivity()
    scores["blocks.0.attn.qkv.weight"][4:8, :] = 5.0
    structured = allocate(scores, 19, "adapter", rank=1)
    assert structured.structured
    figure = sensitivity_figure(structured)
    [corners] = figure.axes[0].lines
    assert len(corners.get_xdata()) == 1
    single, modules = structured.num_unstructured, structured.num_structured
    assert f"{single} single ones, {modules} in Adapters (corners)" in figure.get_suptitle()
    assert "Adapter" not in sensitivity_figure(plan()).get_suptitle()


@pytest.mark.parametrize("depth", [1, 3, 14, 40])
def test_a_corner_is_of_one_form_however_many_blocks(depth: int) -> None:
    """As wide as high, and smaller than half a cell."""
    scores = {f"blocks.{i}.mlp.fc1.weight": torch.full((8, 8), float(i + 1)) for i in range(depth)}
    made = allocate(Sensitivity.from_tensors(scores, 3), 16 * depth, "lora", rank=1)
    figure = sensitivity_figure(made)
    assert_nothing_is_cut(figure)
    heat = figure.axes[0]
    [corners] = heat.lines
    assert len(corners.get_xdata()) == len(made.structured) > 0
    form = corners.get_marker()
    assert form.get_extents().width == form.get_extents().height
    cell = heat.transData.transform([(0, 0), (1, 0)])
    pixels = figure.dpi / 72 * corners.get_markersize() / 2
    assert pixels < 0.5 * (cell[1, 0] - cell[0, 0])


def test_too_many_blocks_for_numbers_have_a_scale_of_colours() -> None:
    scores = {f"blocks.{i}.mlp.fc1.weight": torch.full((8, 8), i + 1.0) for i in range(40)}
    figure = sensitivity_figure(Sensitivity.from_tensors(scores, 3), 100)
    heat, above, beside, *scale = figure.axes
    assert not heat.texts
    assert not above.texts
    assert beside.texts
    assert [axes.get_title(loc="left") for axes in scale[-1].child_axes] == ["% in each cell"]
    assert_nothing_is_cut(figure)


def test_sensitivity_figure_of_scores() -> None:
    by_plan, by_scores = sensitivity_figure(plan()), sensitivity_figure(sensitivity(), 10)
    assert texts(by_plan) == texts(by_scores)
    assert "trained" not in by_scores.get_suptitle()
    with pytest.raises(ValueError, match="budget must be given"):
        sensitivity_figure(sensitivity())


def test_sensitivity_figure_needs_counts() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        sensitivity_figure(Plan({}, {}, plan().info))
