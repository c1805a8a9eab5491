"""Draws how the cost of each op grows, from committed results."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from spt_kernels.files.picture import COLOURS, FAINT, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
PANEL_WIDTH, PANEL_HEIGHT = 3.4, 2.7  # inches


def growth_points(results: Mapping[str, Any]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """(bench, axis) -> its contests, from the smallest size to the largest."""
    points = [contest for contest in results["contests"].values() if contest["axis"]]
    points.sort(key=lambda contest: (contest["bench"], contest["axis"], contest["at"]))
    keyed = groupby(points, key=lambda contest: (contest["bench"], contest["axis"]))
    return {key: list(group) for key, group in keyed}


def growth_figure(results: Mapping[str, Any]) -> Figure:
    """One panel per op and axis: ours, its floor and the others, both scales logarithmic."""
    from matplotlib.figure import Figure

    lines = growth_points(results)
    if not lines:
        raise ValueError("the results hold no points of growth: run the benches first")
    n_rows = -(-len(lines) // COLUMNS)
    size = (COLUMNS * PANEL_WIDTH, n_rows * PANEL_HEIGHT)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = list(figure.subplots(n_rows, COLUMNS, squeeze=False).flat)
    for panel, ((bench, axis), contests) in zip(axes, lines.items(), strict=False):
        _draw_panel(panel, bench, axis, contests)
    for panel in axes[len(lines) :]:
        panel.set_axis_off()
    return figure


def _draw_panel(panel: Axes, bench: str, axis: str, contests: list[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(row["name"] for contest in contests for row in contest["rows"]))
    for number, name in enumerate(names):
        rows = [
            (contest["at"], row)
            for contest in contests
            for row in contest["rows"]
            if row["name"] == name
        ]
        at = [x for x, _ in rows]
        colour = COLOURS[number % len(COLOURS)]
        panel.plot(at, [row["median_ms"] for _, row in rows], "o-", ms=3, label=name, color=colour)
        low, high = [row["min_ms"] for _, row in rows], [row["max_ms"] for _, row in rows]
        panel.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    floors = [(contest["at"], contest["floor_ms"]) for contest in contests if contest["floor_ms"]]
    if floors:
        panel.plot(*zip(*floors, strict=True), "--", color=INK, linewidth=1, label="floor of ours")
    panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms")
    panel.set_title(bench.replace("_", " "), fontsize=9, color=INK, loc="left")
    panel.set_xticks(sizes := [contest["at"] for contest in contests], map(_short, sizes))
    low, high = panel.get_ylim()
    panel.set_ylim(min(low, high / 8), high * 1.35 ** (len(names) + 2))  # room for the legend
    panel.yaxis.set_major_formatter(lambda ms, _: f"{ms:g}")
    panel.xaxis.minorticks_off()
    panel.yaxis.set_minor_formatter(lambda ms, _: "")
    panel.grid(color=FAINT, linewidth=0.5)
    panel.tick_params(labelsize=7)
    panel.xaxis.label.set_size(8)
    panel.yaxis.label.set_size(8)
    panel.legend(fontsize=6, frameon=False, loc="upper left")


def _short(number: float) -> str:
    """`400000` as `400k`."""
    for limit, unit, size in ((1e6, "M", 1e6), (1e4, "k", 1e3)):
        if number >= limit:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"
