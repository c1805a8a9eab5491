"""The cost table as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..files.picture import (
    COLOURS,
    FAINT,
    INK,
    PALE,
    dress,
    new_figure,
    put_heading,
    put_legend,
    put_title,
)
from .row import CostRow
from .table7 import Table7

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNITS = {"GiB": 1 << 30, "MiB": 1 << 20}  # the paper's GB are GiB: what the card's tools show
ROW_HEIGHT = 0.27  # inches
OURS, OTHERS, USUAL = "this package", "other libraries", "usual ways, baselines"
# of bars: the three are apart in print too
_LOOKS: dict[str, dict[str, Any]] = {
    OURS: {"facecolor": COLOURS[0], "edgecolor": COLOURS[0]},
    OTHERS: {"facecolor": COLOURS[1], "edgecolor": INK, "hatch": "///", "linewidth": 0.4},
    USUAL: {"facecolor": PALE, "edgecolor": PALE},
}


def cost_figure(table: Table7) -> Figure:
    """Peak memory of tuning and, where it was timed, the time of a step; a bar per method.

    This package's methods are blue, those of other libraries orange and hatched, all others grey.
    Diamonds are the paper's memory, whiskers the fastest and the slowest round. A bar that would
    flatten all others is cut, and shows it.
    """
    times = _times(table)
    figure = new_figure(1.5 + ROW_HEIGHT * len(table.rows))
    panels = figure.subplots(1, 1 if times is None else 2, sharey=True, squeeze=False)[0]
    shown = {_kind(row): None for row in table.rows}
    handles = [_bar(kind) for kind in _LOOKS if kind in shown]
    handles += _draw_memory(panels[0], table)
    if times is not None:
        handles += _draw_time(panels[1], table, *times)
    dress(*panels)
    for axes in panels:
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=FAINT, linewidth=0.5)
        axes.set_xlabel(None)
    panels[0].set_yticks(range(len(table.rows)), [row.method for row in table.rows])
    panels[0].set_ylim(len(table.rows) - 0.45, -0.55)
    put_heading(figure, _heading(table))
    put_legend(figure, handles, 2 if len(handles) == 4 else 3)
    return figure


def unit_of(numbers: Sequence[int]) -> str:
    """What such numbers of bytes are told in: a unit that most of them are not tiny in."""
    usual = statistics.median(numbers) if numbers else 0
    return "GiB" if usual >= UNITS["GiB"] // 2 else "MiB"


def _draw_memory(axes: Axes, table: Table7) -> list[Any]:
    """The peaks; what there is to explain of them comes back, for the legend."""
    unit = unit_of([row.tuning_peak_bytes for row in table.rows])
    peaks = [row.tuning_peak_bytes / UNITS[unit] for row in table.rows]
    paper = {
        place: table.papers[row.method].tuning_gb * UNITS["GiB"] / UNITS[unit]
        for place, row in enumerate(table.rows)
        if row.method in table.papers
    }
    most = _widest(peaks, list(paper.values()))
    for place, (row, peak) in enumerate(zip(table.rows, peaks, strict=True)):
        is_cut = peak > most
        end = 1.07 * most if is_cut else peak
        axes.barh(place, end, height=0.72, **_LOOKS[_kind(row)])
        if is_cut:
            _break(axes, 0.93 * most, place)
        _note(axes, end, place, f"{_figure(peak)} (cut)" if is_cut else _figure(peak))
    axes.set_xlim(0, 1.36 * most if max(peaks) > most else 1.2 * most)
    how = "measured" if table.setting.on_gpu else "accounted"
    put_title(axes, f"peak memory, {unit} ({how})")
    if not paper:
        return []
    (marks,) = axes.plot(
        list(paper.values()), list(paper), "D", color=INK, ms=3.5, label="the paper's memory"
    )
    return [marks]


def _draw_time(axes: Axes, table: Table7, title: str, scales: Sequence[float | None]) -> list[Any]:
    """The times of a step, each times its scale, likewise."""
    whiskers = []
    for place, (row, scale) in enumerate(zip(table.rows, scales, strict=True)):
        if row.step is None or scale is None:
            _note(axes, 0.0, place, "not run")
            continue
        median, low, high = (scale * ms for ms in (row.step.median_ms, row.step.min_ms,
                                                   row.step.max_ms))  # fmt: skip
        axes.barh(place, median, height=0.72, **_LOOKS[_kind(row)])
        error = [[median - low], [high - median]]
        whiskers.append(axes.errorbar(median, place, xerr=error, color=INK, lw=0.9, capsize=1.8))
        _note(axes, high, place, _figure(median))
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    put_title(axes, title)
    rounds = f"fastest and slowest of {table.setting.rounds} rounds"
    if table.setting.rounds > 1:
        whiskers[0].set_label(rounds)
        return whiskers[:1]
    return []


def _times(table: Table7) -> tuple[str, list[float | None]] | None:
    """What is shown of times, and for each row what makes it of milliseconds; None without any."""
    if not any(row.step for row in table.rows):
        return None
    ratios = [row.step_over_full or table.step_over(row, "full") for row in table.rows]
    if not any(ratios):
        return "time of a step, ms", [1.0] * len(table.rows)
    scales = [
        ratio / row.step.median_ms if ratio and row.step else None
        for ratio, row in zip(ratios, table.rows, strict=True)
    ]
    return "time of a step / that of full tuning", scales


def _heading(table: Table7) -> str:
    setting = table.setting
    text = f"{setting.model_title()}, {setting.dtype}; memory at batch {setting.batch_size}"
    if any(row.step for row in table.rows) and setting.step_batch_size != setting.batch_size:
        text += f", times at batch {setting.step_batch_size}"
    return text if setting.step == "eager" else f"{text}, {setting.step} steps"


def _kind(row: CostRow) -> str:
    if row.is_ours:
        return OURS
    return OTHERS if row.method.startswith("peft-") else USUAL


def _bar(kind: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(label=kind, **_LOOKS[kind])


def _break(axes: Axes, x: float, place: int) -> None:
    """Two slanted cuts through a bar."""
    width = 0.014 * x
    for shift in (0.0, 3.2 * width):
        ends = [x + shift - width, x + shift + width]
        axes.plot(ends, [place + 0.5, place - 0.5], color="white", lw=2.2, solid_capstyle="butt")


def _note(axes: Axes, x: float, place: int, text: str) -> None:
    axes.annotate(
        text, (x, place), (3, 0), textcoords="offset points", va="center", fontsize=7.5, color=INK
    )


def _figure(number: float) -> str:
    """Of at least two digits that tell something."""
    if number >= 99.95:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 2 else f"{number:.2f}"


def _widest(peaks: list[float], marks: list[float]) -> float:
    """The end of the scale: one method that takes ten times as much must not flatten all others."""
    usual = 2 * statistics.median(peaks)
    return max([peak for peak in peaks if peak <= usual] + marks)
