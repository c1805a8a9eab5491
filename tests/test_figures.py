"""Pictures: what is drawn is what the numbers say, and matplotlib is loaded only for drawing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from spt_kernels.allocation import Plan, allocate
from spt_kernels.figures import memory_figure, sensitivity_figure, training_curves_figure
from spt_kernels.memory import MemoryEstimate
from spt_kernels.memory_ledger import CATEGORIES
from spt_kernels.sensitivity import Sensitivity


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


def texts(figure: Figure) -> set[str]:
    return {text.get_text() for axes in figure.axes for text in axes.texts}


def assert_a_picture(figure: Figure, path: Path) -> None:
    figure.savefig(path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width = int.from_bytes(data[16:20], "big")
    assert 1300 <= width <= 1400
    assert len(data) > 5000


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


def test_training_curves(tmp_path: Path) -> None:
    epochs = [{"epoch": i, "train_loss": 1 / i, "val_accuracy": 0.1 * i} for i in (1, 2, 3)]
    without = [{"epoch": i, "train_loss": 2 / i} for i in (1, 2, 3)]
    figure = training_curves_figure({"spt-lora": epochs, "linear": without})
    left, right = figure.axes
    assert [list(line.get_ydata()) for line in left.lines] == [[1, 1 / 2, 1 / 3], [2, 1, 2 / 3]]
    assert [list(line.get_ydata()) for line in right.lines] == [pytest.approx([10, 20, 30])]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["spt-lora", "linear"]
    assert_a_picture(figure, tmp_path / "curves.png")
    assert not training_curves_figure(epochs).legends
    assert "no validation" in texts(training_curves_figure(without))
    with pytest.raises(ValueError, match="at least one epoch"):
        training_curves_figure([])


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
    assert axes.get_xlabel() == "peak memory, GiB (accounted)"
    assert_a_picture(figure, tmp_path / "memory.png")


def test_memory_figure_labels_and_units() -> None:
    figure = memory_figure([estimate("full", 1), estimate("full", 2, "bf16")])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["full fp32", "full bf16"]
    assert "MiB" in figure.axes[0].get_xlabel()
    figure = memory_figure({"mine": estimate("full", 1)})
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["mine"]
    with pytest.raises(ValueError, match="at least one estimate"):
        memory_figure([])


def test_matplotlib_is_loaded_only_for_drawing() -> None:
    code = "import sys, spt_kernels.figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
