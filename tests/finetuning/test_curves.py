"""The training curves are drawn as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from spt_kernels.finetuning.curves import training_curves_figure
from tests.pictures import assert_a_picture, texts


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
