"""The bars of memory are as long as what they show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from spt_kernels.memory import MemoryEstimate
from spt_kernels.memory.figure import memory_figure
from spt_kernels.memory.ledger import CATEGORIES
from tests.pictures import (
    assert_a_picture,
    assert_apart_in_print,
    assert_nothing_is_cut,
    legend_of,
    texts,
)


def estimate(method: str, scale: int, dtype: str = "fp32") -> MemoryEstimate:
    parts = {name: scale * 2**20 * (i + 1) for i, name in enumerate(CATEGORIES)}
    return MemoryEstimate(sum(parts.values()), parts, method, (8, 3, 4, 4), dtype, True, 1)


def test_memory_figure(tmp_path: Path) -> None:
    figure = memory_figure([estimate("full", 100), estimate("spt-lora", 10)])
    [axes] = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["full", "spt-lora"]
    lengths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    assert lengths == [
        pytest.approx([100 * (i + 1) / 1024, 10 * (i + 1) / 1024]) for i in range(len(CATEGORIES))
    ]
    assert texts(figure) == {"1.46", "0.15"}
    assert axes.get_xlabel() == "memory at the moment of the peak, GiB (accounted)"
    assert legend_of(figure) == list(CATEGORIES)
    assert_apart_in_print([bars.patches[0].get_facecolor()[:3] for bars in axes.containers])
    assert_a_picture(figure, tmp_path / "memory.png")


def test_made_up_scores_are_said() -> None:
    made_up = replace(estimate("spt-lora", 10), made_up_scores=True)
    long = "vit_base_patch16_224, 64 × 3 × 224 × 224, bf16-autocast, cuda, adamw, checkpointing"
    figure = memory_figure([estimate("full", 100), made_up], title=long)
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["full", "spt-lora*"]
    assert axes.get_xlabel().endswith("\n* by made-up scores, as skewed as measured ones")
    assert_nothing_is_cut(figure)


def test_memory_figure_labels_and_units() -> None:
    figure = memory_figure([estimate("full", 1), estimate("full", 2, "bf16")])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["full fp32", "full bf16"]
    assert "MiB" in figure.axes[0].get_xlabel()
    figure = memory_figure({"mine": estimate("full", 1)})
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["mine"]
    with pytest.raises(ValueError, match="at least one estimate"):
        memory_figure([])
