"""The table of a benchmark as a picture: each method's mean over each group, and over all."""

from __future__ import annotations

import textwrap
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


_ACROSS = 4  # panels
_LETTERS = 60  # of their names, side by side


def benchmark_figure(table: BenchmarkTable) -> Picture:
    """A row per method and a panel per group: the mean, and a bar of its standard error.

    What is missing has no point; one of some of the seeds is a ring.
    """
    panels = [
        (group, [row.groups[group] for row in table.rows], COLOURS[0]) for group in table.groups
    ]
    if len(panels) > 1:
        panels.append(("mean", [row.mean for row in table.rows], COLOURS[5]))
    down = -(-len(panels) // _ACROSS)
    across = -(-len(panels) // down)
    figure = new_figure(0.5 + down * (1.0 + 0.34 * len(table.rows)))
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    for axes, (name, figures, colour) in zip(grid.flat, panels, strict=False):
        _draw(axes, figures, colour)
        put_title(axes, _in_lines(name, _LETTERS // across))
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    dress(*grid.flat)
    for axes in grid[:, 1:].flat:
        axes.tick_params(axis="y", left=False)
        axes.spines["left"].set_color(FAINT)
    grid[0, 0].set_yticks(range(len(table.rows)), [row.method for row in table.rows])
    grid[0, 0].set_ylim(len(table.rows) - 0.5, -0.5)
    n_seeds = len(table.seeds)
    spread = f", mean ± standard error of {n_seeds} seeds" if n_seeds > 1 else ""
    put_heading(figure, f"{shown_name(table.suite)}, test accuracy of {table.model} in %{spread}")
    return figure


def _in_lines(name: str, letters: int) -> str:
    """A name above a panel that has room for so many letters, in two lines at most."""
    lines = textwrap.wrap(name, letters, max_lines=2, placeholder="…")
    return "\n".join(shown_name(line, letters) for line in lines)


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
