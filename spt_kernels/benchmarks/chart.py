"""The table of a benchmark as a picture: each method's mean over each group, and over all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..files.picture import (
    COLOURS,
    FAINT,
    INK,
    dress,
    new_figure,
    put_heading,
    put_title,
    shown_name,
)
from .table import BenchmarkTable, Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture


def benchmark_figure(table: BenchmarkTable) -> Picture:
    """A row per method and a panel per group: the mean, and a bar of its standard error.

    What is missing has no point; one of some of the seeds is a ring.
    """
    panels = {group: [row.groups[group] for row in table.rows] for group in table.groups}
    if len(panels) > 1:
        panels["mean"] = [row.mean for row in table.rows]
    figure = new_figure(1.5 + 0.34 * len(table.rows))
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, figures) in zip(every, panels.items(), strict=True):
        colour = COLOURS[5] if name == "mean" and len(panels) > 1 else COLOURS[0]
        _draw(axes, figures, colour)
        put_title(axes, name)
    dress(*every)
    for axes in every[1:]:
        axes.tick_params(axis="y", left=False)
        axes.spines["left"].set_color(FAINT)
    every[0].set_yticks(range(len(table.rows)), [row.method for row in table.rows])
    every[0].set_ylim(len(table.rows) - 0.5, -0.5)
    n_seeds = len(table.seeds)
    spread = f", mean ± standard error of {n_seeds} seeds" if n_seeds > 1 else ""
    put_heading(figure, f"{shown_name(table.suite)}, test accuracy of {table.model} in %{spread}")
    return figure


def _draw(axes: Axes, figures: Sequence[Figure], colour: str) -> None:
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.margins(x=0.35)
    for row, figure in enumerate(figures):
        if figure.mean is None:
            continue
        error = figure.standard_error
        look: dict[str, Any] = {"color": colour, "markersize": 5, "capsize": 3, "zorder": 3}
        if not figure.is_complete:
            look["markerfacecolor"] = "white"
        percent = 100 * figure.mean
        axes.errorbar(percent, row, xerr=None if error is None else 100 * error, fmt="o", **look)
        axes.annotate(
            f"{percent:.1f}",
            (percent, row),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
            color=INK,
        )
