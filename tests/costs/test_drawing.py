"""The picture of the cost table shows what the rows say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from spt_kernels.costs import CostRow, CostSetting, Table7
from spt_kernels.costs.drawing import cost_figure, unit_of
from spt_kernels.costs.row import Spread
from tests.pictures import assert_apart_in_print, assert_nothing_is_cut, legend_of, texts, titles

MIB, GIB = 1 << 20, 1 << 30


def row(method: str, peak: int, step_ms: float | None = None, over: float | None = None) -> CostRow:
    step = None if step_ms is None else Spread(step_ms, 0.9 * step_ms, 1.2 * step_ms)
    return CostRow(method, 5, 0.1, peak, tuning_peak_bytes=peak, step=step, step_over_full=over)


def figure_of(*rows: CostRow, **setting: Any) -> Any:
    return cost_figure(Table7(CostSetting(**setting), rows))


def test_the_unit_is_that_of_the_usual_row() -> None:
    assert unit_of([3 * MIB, 4 * MIB, 900 * GIB]) == "MiB"
    assert unit_of([3 * MIB, 4 * GIB, 5 * GIB]) == "GiB"
    assert unit_of([]) == "MiB"
    figure = figure_of(row("full", 40 * MIB), row("linear", 9 * MIB), row("lora-16", 90 * GIB))
    assert titles(figure) == ["peak memory, MiB (accounted)"]


def test_a_bar_that_is_cut_shows_it() -> None:
    table = row("full", 8 * GIB), row("spt-lora", 5 * GIB), row("published-layer", 137 * GIB)
    figure = figure_of(*table, batch_size=8)
    [memory] = figure.axes
    assert [text.get_text() for text in memory.texts] == ["8.0", "5.0", "137 (cut)"]
    lengths = [bar.get_width() for bar in memory.patches]
    assert lengths[:2] == pytest.approx([8, 5])
    assert 8 < lengths[2] < 10
    assert memory.get_xlim()[1] > lengths[2], "the end of the bar is in the picture"
    cuts = [line for line in memory.lines if line.get_color() == "white"]
    assert len(cuts) == 2
    assert all(max(line.get_xdata()) < lengths[2] for line in cuts)
    assert_nothing_is_cut(figure)
    assert not figure_of(*table[:2], batch_size=8).axes[0].lines


def test_what_was_not_timed_has_no_panel() -> None:
    assert len(figure_of(row("full", GIB), rounds=0).axes) == 1
    timed = figure_of(row("full", GIB, 50.0, 1.0), row("lora-16", GIB))
    assert titles(timed)[1] == "time of a step / that of full tuning"
    assert "not run" in texts(timed)


def test_whiskers_go_from_the_fastest_to_the_slowest_round() -> None:
    figure = figure_of(row("full", GIB, 50.0, 1.0), row("spt-lora", GIB, 30.0, 0.5), rounds=5)
    time = figure.axes[1]
    assert [bar.get_width() for bar in time.patches] == pytest.approx([1.0, 0.5])
    drawn = [tuple(lines.get_segments()[0][:, 0]) for lines in time.collections]
    assert drawn == [pytest.approx((0.9, 1.2)), pytest.approx((0.45, 0.6))]
    assert "fastest and slowest of 5 rounds" in legend_of(figure)
    once = figure_of(row("full", GIB, 50.0, 1.0), rounds=1)
    assert not any("rounds" in text for text in legend_of(once))


def test_times_without_full_tuning_are_still_shown() -> None:
    """On a CPU each row was timed in turn with it; elsewhere milliseconds remain."""
    beside = figure_of(row("spt-lora", GIB, 30.0, 0.5))
    assert [bar.get_width() for bar in beside.axes[1].patches] == pytest.approx([0.5])
    alone = figure_of(row("spt-lora", GIB, 30.0), row("lora-16", GIB, 40.0))
    assert titles(alone)[1] == "time of a step, ms"
    assert [bar.get_width() for bar in alone.axes[1].patches] == pytest.approx([30, 40])


def test_the_legend_tells_whose_each_bar_is() -> None:
    rows = [row("full", GIB), row("spt-lora", GIB), row("peft-lora-16", GIB)]
    figure = figure_of(*rows)
    paper = "the paper's memory"
    assert legend_of(figure) == ["this package", "other libraries", "usual ways, baselines", paper]
    own, others, usual = (patch.get_facecolor()[:3] for patch in figure.legends[0].get_patches())
    assert_apart_in_print([own, others])
    assert_apart_in_print([own, usual])
    hatches = [patch.get_hatch() for patch in figure.axes[0].patches]
    assert hatches[0] is hatches[1] is None
    assert hatches[2]
    mine = figure_of(replace(rows[1], method="spt-adapter"), batch_size=3)
    assert legend_of(mine) == ["this package"]
