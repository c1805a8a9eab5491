"""Draws how alike the selections of every two tasks are, beside what chance gives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...files.picture import COLOURS, INK, shown_name
from ..overlap import SelectionOverlap
from .paper import LETTERS, SMALL, finish, paper_figure, width_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ONE_COLUMN = 7  # tasks
_LEAST_CELL = 0.22  # inches, or two columns are taken
_BAR = 0.75  # inches beside the matrix
_LEAST = 2.0  # times chance, at the ends of the scale: what is like chance does not look unlike it


def overlap_figure(
    made: SelectionOverlap, *, columns: int | None = None, title: str | None = None
) -> Figure:
    """A matrix of tasks: below the diagonal what two share, above it how many times chance.

    Below: what both select, as a share of what either does, in per cent; the darker the more.
    Above: that over what it would be if each task drew as many of every matrix at random: blue is
    more alike than chance, orange less, white alike by chance.

    Args:
        made: of `selection_overlap`.
        columns: of a paper, 1 or 2; by default 1 for up to seven tasks whose names are short.
        title: above it.
    """
    n, tasks = len(made.tasks), [shown_name(task) for task in made.tasks]
    names = 0.1 + max(map(len, tasks)) * 0.6 * SMALL / 72  # inches of the longest name
    is_narrow = n <= _ONE_COLUMN and n * _LEAST_CELL <= width_of(1) - names - _BAR
    columns = columns or (1 if is_narrow else 2)
    width = width_of(columns)
    side, below = width - names - _BAR, names + 0.2
    figure = paper_figure(columns, side + below + (0.2 if title else 0.05), title)
    height = figure.get_figheight()
    figure.set_layout_engine("none")  # the matrix is to be a square of this side
    axes = figure.add_axes((names / width, below / height, side / width, side / height))
    bar = figure.add_axes(
        ((width - _BAR + 0.1) / width, below / height, 0.1 / width, side / height)
    )
    scale, greys = _scale(made), _greys(made)
    cell = 72 * side / n  # points
    letters = max(4.5, min(SMALL, 0.3 * cell))
    for pair in made.pairs:
        first, second = made.tasks.index(pair.first), made.tasks.index(pair.second)
        exponent = _exponent(pair.over_chance, scale.norm.vmax)
        for x, y, colour, text in (
            (first, second, greys.to_rgba(pair.jaccard), _percent(pair.jaccard)),
            (second, first, scale.to_rgba(exponent), _times(pair.over_chance)),
        ):
            _put_cell(axes, x, y, colour)
            ink = "white" if sum(colour[:3]) < 1.5 else INK
            axes.text(x, y, text, ha="center", va="center", fontsize=letters, color=ink)
    for place in range(n):
        _put_cell(axes, place, place, "white")
    axes.set_xlim(-0.5, n - 0.5)
    axes.set_ylim(n - 0.5, -0.5)
    finish(axes)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=min(SMALL, max(letters, 0.75 * cell)))
    axes.set_xticks(range(n), tasks, rotation=90)
    axes.set_yticks(range(n), tasks)
    axes.set_xlabel("below: shared, %   above: × chance")
    _put_bar(figure, bar, scale)
    return figure


def _put_bar(figure: Figure, axes: Any, scale: Any) -> None:
    bar = figure.colorbar(scale, cax=axes)
    most = math.floor(scale.norm.vmax)
    step = -(-most // 3)
    ticks = range(-step * (most // step), most + 1, step)
    bar.set_ticks(list(ticks), labels=[_power(tick) for tick in ticks])
    bar.ax.tick_params(labelsize=SMALL, colors=INK, width=0.6, length=2)
    bar.set_label("times chance", fontsize=LETTERS, color=INK)
    bar.outline.set_visible(False)


def _scale(made: SelectionOverlap) -> Any:
    """Of the logarithm to base 2 of how many times chance, as far below 0 as above."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    known = [pair.over_chance for pair in made.pairs if pair.over_chance]
    most = max([math.log2(_LEAST), *(abs(math.log2(times)) for times in known)])
    colours = LinearSegmentedColormap.from_list("chance", [COLOURS[5], "#fbfbfb", COLOURS[0]])
    return ScalarMappable(Normalize(-most, most), colours)


def _greys(made: SelectionOverlap) -> Any:
    """Of what two tasks share, from nothing to the most."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    most = max(pair.jaccard for pair in made.pairs) or 1.0
    colours = LinearSegmentedColormap.from_list("greys", ["#fbfbfb", "#9aa4af"])
    return ScalarMappable(Normalize(0, most), colours)


def _exponent(times: float | None, most: float) -> float:
    if times is None:
        return 0.0
    return math.log2(times) if times else -most


def _put_cell(axes: Any, x: int, y: int, colour: Any) -> None:
    from matplotlib.patches import Rectangle

    corner = (x - 0.5, y - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor="white", linewidth=0.8))


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f}" if percent >= 9.95 else f"{percent:.1f}"


def _times(times: float | None) -> str:
    if times is None:
        return "–"
    return f"×{times:.0f}" if times >= 9.95 else f"×{times:.1f}"


def _power(exponent: int) -> str:
    return f"×{2**exponent}" if exponent >= 0 else f"×1/{2**-exponent}"
