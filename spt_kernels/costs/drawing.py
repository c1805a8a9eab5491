"""The cost table as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..files.picture import COLOURS, FAINT, INK, new_figure
from .row import CostRow
from .table7 import Table7

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNITS = {"GiB": 1 << 30, "MiB": 1 << 20}  # the paper's GB are GiB: what the card's tools show
ROW_HEIGHT = 0.34  # inches


def cost_figure(table: Table7) -> Figure:
    """Peak memory of tuning and the time of a step, a bar per method; diamonds are the paper's.

    This package's methods are blue, those of other libraries orange, all others grey.
    """
    figure = new_figure(1.4 + ROW_HEIGHT * len(table.rows))
    memory, time = figure.subplots(1, 2, sharey=True)
    names = [row.method for row in table.rows]
    colours = [_colour(row) for row in table.rows]

    unit = unit_of([row.tuning_peak_bytes for row in table.rows])
    peaks = [row.tuning_peak_bytes / UNITS[unit] for row in table.rows]
    memory.barh(names, peaks, color=colours)
    how = "measured" if table.setting.on_gpu else "accounted"
    title = f"peak, {unit} ({how}), batch {table.setting.batch_size}"
    papers = table.papers
    marks = [(papers[name].tuning_gb, name) for name in names if name in papers]
    if marks:
        memory.plot(*zip(*marks, strict=True), "D", color=INK, ms=4)
        title += ";  \N{BLACK DIAMOND} the paper"
    _label(memory, title)
    most = _widest(peaks, [mark for mark, _ in marks])
    memory.set_xlim(0, 1.12 * most)
    for number, peak in enumerate(peaks):  # a bar that leaves the picture still says its length
        memory.text(min(peak, most) + 0.01 * most, number, f"{peak:.1f}", va="center", fontsize=7,
                    color=INK, backgroundcolor="white" if peak > most else "none")  # fmt: skip

    ratios = [table.step_over(row, "full") for row in table.rows]
    time.barh(names, [ratio or 0.0 for ratio in ratios], color=colours)
    for number, ratio in enumerate(ratios):
        text = "not run" if ratio is None else f"{ratio:.2f}"
        time.text((ratio or 0.0) + 0.01, number, text, va="center", fontsize=7, color=INK)
    time.set_xlim(0, 1.12 * max(ratio or 0.0 for ratio in ratios) or None)
    _label(time, "time of a step over full fine-tuning")
    memory.invert_yaxis()
    setting = table.setting
    heading = f"{setting.model_title()}, {setting.dtype}"
    figure.suptitle(heading, fontsize=10, x=0.01, ha="left", color=INK)
    return figure


def unit_of(numbers: Sequence[int]) -> str:
    """What such numbers of bytes are told in."""
    return "GiB" if max(numbers, default=0) >= UNITS["GiB"] // 2 else "MiB"


def _colour(row: CostRow) -> str:
    if row.is_ours:
        return COLOURS[0]
    return COLOURS[1] if row.method.startswith("peft-") else COLOURS[-1]


def _widest(peaks: list[float], marks: list[float]) -> float:
    """The end of the scale: one method that takes ten times as much must not flatten all others."""
    usual = 2 * statistics.median(peaks)
    return max([peak for peak in peaks if peak <= usual] + marks)


def _label(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=8, loc="left", color=INK)
    axes.grid(axis="x", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
