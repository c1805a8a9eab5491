"""Where a plan's most sensitive parameters lie: the paper's Figure 4."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..files.picture import COLOURS, INK, dress, new_figure
from ..sensitivity import Sensitivity
from .allocation import allocate
from .cell import Cell
from .plan import Plan
from .table import ordered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def sensitivity_figure(
    source: Plan | Sensitivity, budget: int | float | None = None, *, title: str | None = None
) -> Figure:
    """Where the most sensitive parameters are, by block and by operation (the paper's Figure 4).

    Each cell is the share of all selected parameters (Eq. 4) that lie in one operation of one
    block; bars above and beside it are the shares of whole blocks and operations. A corner marks
    what the plan tunes with a LoRA or an Adapter (Eq. 5).

    Args:
        source: a plan, or a sensitivity together with a `budget`.
        budget: with a sensitivity, how many parameters to select, or which share of the backbone.
        title: instead of the one that says how many parameters were selected.
    """
    if isinstance(source, Sensitivity):
        if budget is None:
            raise ValueError("budget must be given with a Sensitivity: how many to select")
        source = allocate(source, budget, structured=None)
    cells = source.cells()
    blocks = list(dict.fromkeys(block for block, _ in cells))
    operations = ordered(operation for _, operation in cells)
    total = sum(cell.selected for cell in cells.values())
    if total == 0:
        raise ValueError("the plan has no counts of selected parameters, there is nothing to draw")
    share = {key: 100 * cell.selected / total for key, cell in cells.items()}

    height = 1.9 + 0.34 * len(operations)
    figure = new_figure(height)
    grid = figure.add_gridspec(
        2,
        2,
        width_ratios=(5, 1),
        height_ratios=(1, 0.3 * len(operations)),
        wspace=0.03,
        hspace=0.05,
    )
    heat = figure.add_subplot(grid[1, 0])
    above = figure.add_subplot(grid[0, 0], sharex=heat)
    beside = figure.add_subplot(grid[1, 1], sharey=heat)
    _draw_heat(heat, blocks, operations, cells, share)
    by_block = [sum(share.get((b, o), 0.0) for o in operations) for b in blocks]
    by_operation = [sum(share.get((b, o), 0.0) for b in blocks) for o in operations]
    bars = above.bar(range(len(blocks)), by_block, color=COLOURS[0], width=0.8)
    above.bar_label(bars, [_short(v) for v in by_block], fontsize=7.5, padding=1, color=INK)
    bars = beside.barh(range(len(operations)), by_operation, color=COLOURS[0], height=0.7)
    beside.bar_label(bars, [_short(v) for v in by_operation], fontsize=7.5, padding=2, color=INK)
    dress(heat, above, beside)
    for axes, side in ((above, "left"), (beside, "bottom")):
        axes.tick_params(labelbottom=False, labelleft=False, length=0)
        axes.spines[[side]].set_visible(False)
        axes.margins(0.12)
    heat.set_ylim(len(operations) - 0.5, -0.5)
    heat.set_xlim(-0.5, len(blocks) - 0.5)
    module = "an Adapter" if source.kind == "adapter" else "a LoRA"
    notes = f"; corner: tuned with {module}" if source.structured else ""
    figure.suptitle(
        title or f"Where the {total:,} most sensitive parameters lie (% of them{notes})",
        fontsize=10.5,
        color=INK,
    )
    return figure


def _draw_heat(
    axes: Axes,
    blocks: list[str],
    operations: list[str],
    cells: Mapping[tuple[str, str], Cell],
    share: Mapping[tuple[str, str], float],
) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("ink", ["#f6f9fc", "#9ecae1", "#0072B2", "#08305c"])
    highest = max(share.values())
    for x, block in enumerate(blocks):
        for y, operation in enumerate(operations):
            if (block, operation) not in cells:
                continue
            value = share[block, operation]
            corner = (x - 0.5, y - 0.5)
            axes.add_patch(_square(corner, colours(value / highest)))
            ink = "white" if value > 0.45 * highest else INK
            axes.text(x, y, _short(value), ha="center", va="center", fontsize=7.5, color=ink)
            if cells[block, operation].structured:
                axes.add_patch(_corner_mark(x, y))
    axes.set_xticks(range(len(blocks)), [_short_block(block) for block in blocks])
    axes.set_yticks(range(len(operations)), operations)
    if len(blocks) > 16:
        axes.tick_params(axis="x", rotation=90)
    axes.tick_params(length=0)
    axes.set_xlabel("block   (· is below 0.05 %)")
    axes.spines[:].set_visible(False)


def _square(corner: tuple[float, float], colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, facecolor=colour, edgecolor="white", linewidth=1.2)


def _corner_mark(x: float, y: float) -> Any:
    from matplotlib.patches import Polygon

    points = [(x + 0.47, y - 0.46), (x + 0.19, y - 0.46), (x + 0.47, y - 0.1)]
    return Polygon(points, facecolor=COLOURS[1], edgecolor="none")


def _short(percent: float) -> str:
    """At most three characters: `0`, `.4`, `7.2`, `31`."""
    if percent >= 9.95:
        return f"{percent:.0f}"
    text = f"{percent:.1f}"
    return "0" if percent == 0 else text.removeprefix("0") if text != "0.0" else "·"


def _short_block(name: str) -> str:
    """`blocks.3` as `3`, `stages.2.blocks.1` as `2.1`, what is outside all blocks as `rest`."""
    return ".".join(re.findall(r"\d+", name)) or name or "rest"
