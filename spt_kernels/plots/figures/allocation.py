"""Draws what a plan does with each operation of each block: the paper's Figures 1b and 2."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...files.picture import COLOURS, INK, SHADES
from ..allocated import Allocation
from .block_axis import mark_blocks, places_of
from .paper import LETTERS, SMALL, WIDTHS, finish, paper_figure, put_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ONE_COLUMN = 16  # blocks
_LEAST = 0.001  # % at the lower end of the scale; what is less looks the same
_NONE = "#f3f4f6"


def allocation_figure(
    made: Allocation, *, columns: int | None = None, title: str | None = None
) -> Figure:
    """A cell for each operation of each block: how much of it is sensitive, and what is trained.

    The colour is the share of the cell's parameters that are selected (Eq. 4), on a logarithmic
    scale; pale grey is none. A square is a LoRA, a diamond an Adapter, a dot is single entries
    (Eq. 5). Where the model has no such operation there is no cell.

    Args:
        made: of `allocation`.
        columns: of a paper, 1 or 2; by default as many as the blocks need.
        title: above it.
    """
    columns = columns or (1 if len(made.blocks) <= _ONE_COLUMN else 2)
    rows = len(made.operations)
    figure = paper_figure(columns, 1.0 + 0.19 * max(rows, 4), title)
    axes = figure.add_subplot()
    scale = _scale(made)
    room = (WIDTHS[columns] - 1.2) * 72 / len(made.blocks)  # points of a cell
    places = dict(zip(made.blocks, places_of(made.blocks), strict=True))
    marks: dict[str, list[tuple[float, int]]] = {"module": [], "entries": []}
    for (block, operation), cell in made.cells.items():
        x, y = places[block], made.operations.index(operation)
        share = 100 * cell.selected / cell.numel
        _put_cell(axes, x, y, scale.to_rgba(share) if cell.selected else _NONE)
        if cell.structured:
            marks["module"].append((x, y))
        if cell.unstructured:
            marks["entries"].append((x, y))
    handles = _put_marks(axes, made, marks, min(6.0, 0.5 * room))
    axes.set_ylim(rows - 0.5, -0.5)
    finish(axes)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_yticks(range(rows), made.operations)
    axes.tick_params(length=0)
    mark_blocks(axes, made.blocks, room=16 if columns == 1 else 40)
    bar = figure.colorbar(scale, ax=axes, pad=0.02, aspect=18, fraction=0.05, extend="min")
    bar.set_label("selected, %", fontsize=LETTERS, color=INK)
    bar.ax.tick_params(labelsize=SMALL, colors=INK, width=0.6, length=2)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    put_key(figure, handles, len(handles))
    return figure


def _scale(made: Allocation) -> Any:
    """From the least to the most selected cell."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    shares = [100 * c.selected / c.numel for c in made.cells.values() if c.selected]
    low = max(_LEAST, 10.0 ** math.floor(math.log10(min(shares))))
    high = 10.0 ** math.ceil(math.log10(max(shares)))
    colours = LinearSegmentedColormap.from_list("ink", ["#dbe9f6", *SHADES[1:]])
    return ScalarMappable(LogNorm(low, max(high, 10 * low)), colours)


def _put_cell(axes: Axes, x: float, y: int, colour: Any) -> None:
    from matplotlib.patches import Rectangle

    corner = (x - 0.5, y - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor="white", linewidth=0.8))


def _put_marks(
    axes: Axes, made: Allocation, marks: dict[str, list[tuple[float, int]]], size: float
) -> list[Any]:
    """The marks of what is trained; one of each comes back, for the key."""
    looks = {
        "module": ("D" if made.module == "Adapter" else "s", COLOURS[1], size, made.module),
        "entries": ("o", "white", 0.5 * size, "single entries"),
    }
    handles = []
    for kind, places in marks.items():
        if places:
            marker, colour, points, label = looks[kind]
            handles += axes.plot(
                *zip(*places, strict=True), linestyle="none", marker=marker, color=colour,
                markersize=points, markeredgecolor=INK, markeredgewidth=0.5, label=label,
            )  # fmt: skip
    return handles
