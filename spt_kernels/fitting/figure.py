"""Memory against time of every way to train, as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..files.picture import (
    FAINT,
    INK,
    LINE_COLOURS,
    LINES,
    dress,
    new_figure,
    put_heading,
    put_legend,
)
from .fit import Fitted

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def undominated(ways: Iterable[Fitted]) -> list[Fitted]:
    """Those that no other beats in both memory and time, from the most memory to the least."""
    kept: list[Fitted] = []
    for way in sorted(ways, key=lambda way: (way.seconds, way.peak_bytes)):
        if not kept or way.peak_bytes < kept[-1].peak_bytes:
            kept.append(way)
    return kept


def frontier_figure(
    ways: Mapping[str, Sequence[Fitted]], limit_bytes: int | None = None, *, title: str = ""
) -> Figure:
    """What each method takes at best: a step down where less memory takes more time.

    Args:
        ways: of each method, by the name that the legend shows.
        limit_bytes: is drawn as a line.
        title: of the picture.
    """
    if not ways or not all(ways.values()):
        raise ValueError("ways must hold one or more ways for each name")
    figure = new_figure(4.0)
    axes = figure.add_subplot()
    fastest = min(way.seconds for own in ways.values() for way in own)
    lines = []
    for place, (name, own) in enumerate(ways.items()):
        best = undominated(own)
        memory = [way.peak_bytes / 2**30 for way in best]
        time = [way.seconds / fastest for way in best]
        lines += axes.plot(
            memory, time, label=name, drawstyle="steps-pre", linewidth=1.4, marker="o",
            markersize=3, color=LINE_COLOURS[place % len(LINE_COLOURS)],
            linestyle=LINES[place // len(LINE_COLOURS) % len(LINES)],
        )  # fmt: skip
    if limit_bytes is not None:
        axes.axvline(limit_bytes / 2**30, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.annotate(
            f"{limit_bytes / 2**30:.3g} GiB", (limit_bytes / 2**30, 1), (3, -9),
            xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    axes.set_xlabel("peak memory of a step, GiB (accounted)")
    axes.set_ylabel("time, of the fastest (modelled)")
    axes.grid(color=FAINT, linewidth=0.6)
    dress(axes)
    put_legend(figure, lines, 3)
    if title:
        put_heading(figure, title)
    return figure
