"""The training curves are drawn as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from spt_kernels.finetuning.results.curves import training_curves_figure
from tests.pictures import assert_a_picture, legend_of, titles

Epochs = list[dict[str, Any]]
WITHOUT: Epochs = [{"epoch": i, "train_loss": 2 / i} for i in (1, 2, 3)]


def run(factor: float = 1.0) -> Epochs:
    return [
        {"epoch": i, "train_loss": factor / i, "val_loss": None, "val_accuracy": None}
        | ({"val_loss": factor * i, "val_accuracy": 0.1 * i} if i > 1 else {})
        for i in (1, 2, 3)
    ]


def lines(axes: Any) -> list[list[float]]:
    return [list(line.get_ydata()) for line in axes.lines if len(line.get_ydata())]


def test_both_losses_of_one_run_share_a_panel(tmp_path: Path) -> None:
    figure = training_curves_figure({"spt-lora": run()}, title="vit_tiny_patch16_224, spt-lora")
    loss, accuracy = figure.axes
    assert lines(loss) == [[1, 1 / 2, 1 / 3], [2, 3]]
    assert lines(accuracy) == [pytest.approx([20, 30])]
    assert titles(figure) == ["loss", "validation accuracy, %"]
    assert legend_of(figure) == ["training", "validation"]
    assert figure.get_suptitle() == "vit_tiny_patch16_224, spt-lora"
    assert_a_picture(figure, tmp_path / "curves.png")


def test_several_runs_have_a_panel_for_each_figure() -> None:
    figure = training_curves_figure({"spt-lora": run(), "linear": WITHOUT})
    assert titles(figure) == ["training loss", "validation loss", "validation accuracy, %"]
    train, loss, accuracy = map(lines, figure.axes)
    assert train == [[1, 1 / 2, 1 / 3], [2, 1, 2 / 3]]
    assert loss == [[2, 3]]
    assert accuracy == [pytest.approx([20, 30])]
    assert legend_of(figure) == ["spt-lora", "linear"]
    styles = {line.get_linestyle() for line in figure.axes[0].lines}
    assert len(styles) == 2, "apart without colours"


def test_every_seed_is_a_thin_line_and_their_mean_a_thick_one() -> None:
    figure = training_curves_figure({"lora": [run(1), run(3)], "linear": WITHOUT})
    drawn = [line for line in figure.axes[1].lines if len(line.get_ydata())]
    assert lines(figure.axes[1]) == [[2, 3], [6, 9], pytest.approx([4, 6])]
    assert drawn[0].get_linewidth() < drawn[2].get_linewidth()
    assert legend_of(figure) == ["lora", "linear", "thin: single runs"]


def test_nothing_is_drawn_of_what_no_run_has() -> None:
    figure = training_curves_figure(WITHOUT)
    assert titles(figure) == ["training loss"]
    assert not figure.legends
    assert titles(training_curves_figure({"a": WITHOUT, "b": WITHOUT})) == ["training loss"]
    with pytest.raises(ValueError, match="at least one epoch"):
        training_curves_figure([])
    with pytest.raises(ValueError, match="at least one epoch"):
        training_curves_figure({"spt-lora": []})


@pytest.mark.parametrize("epochs", [1, 2])
def test_epochs_are_whole_numbers(epochs: int) -> None:
    run = [{"epoch": 1 + place, "train_loss": 1.0} for place in range(epochs)]
    [axes] = training_curves_figure(run).axes
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks == [1 + place for place in range(epochs)]
