"""Runs side by side, as a picture: accuracy, what is trained, memory and time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...files.picture import COLOURS, FAINT, INK, dress, new_figure, put_title, shown_name
from .comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GIB, _MIB = 1 << 30, 1 << 20
_LONGEST = 28  # letters of a line of a name


def comparison_figure(comparison: Comparison, *, title: str | None = None) -> Figure:
    """A row per way: its accuracy with every run, the share it trains, its peak, its time.

    The dot is the mean over seeds, the bar through it the standard error, rings below are the runs.

    Args:
        comparison: of `compare_runs`.
        title: above all panels.
    """
    ways = comparison.ways
    names = [[shown_name(part, _LONGEST) for part in way.name.split(", ")] for way in ways]
    row_inches = max(0.46, 0.1 + 0.15 * max(map(len, names)))
    figure = new_figure(1.4 + row_inches * len(ways))
    accuracy, share, peak, time = figure.subplots(1, 4, sharey=True, width_ratios=(2.6, 1, 1, 1))
    rows = range(len(ways))
    for row, way in enumerate(ways):
        percents = [100 * value for value in way.accuracies]
        look: dict[str, Any] = {"color": COLOURS[0], "zorder": 3}
        if len(percents) > 1:
            below = [row + 0.24] * len(percents)
            accuracy.scatter(percents, below, s=18, facecolors="none", edgecolors="#777777")
        if way.mean is not None:
            error = None if way.standard_error is None else 100 * way.standard_error
            accuracy.errorbar(
                100 * way.mean, row, xerr=error, fmt="o", markersize=5, capsize=4, **look
            )
    put_title(accuracy, f"{comparison.images} accuracy, %")
    if any(len(way.accuracies) > 1 for way in ways):
        accuracy.set_xlabel("mean ± standard error, and the runs")
    peaks = [way.peak_bytes for way in ways]
    unit, name = (_GIB, "GiB") if max(peaks) >= _GIB else (_MIB, "MiB")
    for axes, values, text in (
        (share, [100 * way.trained_share for way in ways], "trained, %"),
        (peak, [value / unit for value in peaks], f"peak, {name}"),
        (time, [way.seconds for way in ways], "time, s"),
    ):
        bars = axes.barh(rows, values, color=COLOURS[4], height=0.5)
        axes.bar_label(bars, list(map(_short, values)), fontsize=8, padding=2, color=INK)
        axes.margins(x=0.5)  # for the labels
        axes.set_xlim(left=0)
        put_title(axes, text)
    peak.set_xlabel(comparison.peak)
    dress(accuracy, share, peak, time)
    for axes in (share, peak, time):
        axes.tick_params(labelbottom=False, bottom=False, left=False)
        axes.spines["bottom"].set_visible(False)
    accuracy.set_yticks(rows, list(map("\n".join, names)))
    accuracy.set_ylim(len(ways) - 0.5, -0.5)
    accuracy.margins(x=0.08)
    accuracy.grid(axis="x", color=FAINT, linewidth=0.6)
    if title:
        figure.suptitle(title, fontsize=10.5, color=INK)
    return figure


def _short(value: float) -> str:
    """Three digits, or all that are before the point."""
    digits = 2 - math.floor(math.log10(value)) if value else 0
    return f"{value:,.{max(0, digits)}f}"
