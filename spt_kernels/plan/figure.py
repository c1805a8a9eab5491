"""Where a plan's most sensitive parameters lie: the paper's Figure 4."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..files.picture import (
    COLOURS,
    INK,
    SHADES,
    WIDTH,
    dress,
    new_figure,
    put_heading,
    put_title,
)
from ..sensitivity import Sensitivity
from .allocation import allocate
from .cell import Cell
from .plan import Plan
from .table import ordered, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROOM_FOR_NUMBERS = 0.19  # inches of a cell
_NUMBERS: dict[str, Any] = {"fontsize": 7, "color": INK}


def sensitivity_figure(
    source: Plan | Sensitivity, budget: int | float | None = None, *, title: str | None = None
) -> Figure:
    """Where the most sensitive parameters are, by block and by operation (the paper's Figure 4).

    Each cell is the share of all selected parameters (Eq. 4) that lie in one operation of one
    block; bars above and beside it are the shares of whole blocks and operations. A corner marks
    what the plan tunes with a LoRA or an Adapter (Eq. 5). Where blocks are too many for numbers, a
    scale of the colours stands in for them.

    Args:
        source: a plan, or a sensitivity together with a `budget`.
        budget: with a sensitivity, how many parameters to select, or which share of the backbone.
        title: instead of the one that says how many parameters were selected and are trained.
    """
    is_plan = isinstance(source, Plan)
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

    across = min(5.0, max(1.5, 0.7 * len(blocks)))  # few blocks leave the bars beside more room
    figure = new_figure(2.1 + 0.25 * len(operations))
    grid = figure.add_gridspec(
        2,
        2,
        width_ratios=(across, 6 - across),
        height_ratios=(1, 0.3 * len(operations)),
        wspace=0.03,
        hspace=0.05,
    )
    heat = figure.add_subplot(grid[1, 0])
    above = figure.add_subplot(grid[0, 0], sharex=heat)
    beside = figure.add_subplot(grid[1, 1], sharey=heat)
    cell_width = WIDTH * across / 6 * 0.85 / len(blocks)  # inches, labels on the left taken off
    has_room = cell_width >= _ROOM_FOR_NUMBERS
    scale = _draw_heat(heat, blocks, operations, cells, share, has_room)
    _mark_structured(heat, blocks, operations, cells, cell_width)
    if not has_room:
        _draw_scale(figure.add_subplot(grid[0, 1]), scale)
    by_block = [sum(share.get((b, o), 0.0) for o in operations) for b in blocks]
    by_operation = [sum(share.get((b, o), 0.0) for b in blocks) for o in operations]
    bars = above.bar(range(len(blocks)), by_block, color=COLOURS[0], width=0.8)
    if has_room:
        above.bar_label(bars, [_short(v) for v in by_block], **_NUMBERS, padding=1)
    bars = beside.barh(range(len(operations)), by_operation, color=COLOURS[0], height=0.7)
    beside.bar_label(bars, [_short(v) for v in by_operation], **_NUMBERS, padding=2)
    dress(heat, above, beside)
    above.tick_params(labelbottom=False, labelleft=not has_room, length=0)
    beside.tick_params(labelbottom=False, labelleft=False, length=0)
    above.spines[["left"]].set_visible(not has_room)
    beside.spines[["bottom"]].set_visible(False)
    above.margins(y=0.15)
    beside.margins(x=0.3)
    put_title(above, "% in each block")
    put_title(beside, "% in each\noperation" if across > 4 else "% in each operation")
    if has_room and any(_short(value) == "·" for value in (*share.values(), *by_operation)):
        beside.set_xlabel("· is below\n0.05 %" if across > 4 else "· is below 0.05 %")
    heat.set_ylim(len(operations) - 0.5, -0.5)
    heat.set_xlim(-0.5, len(blocks) - 0.5)
    put_heading(figure, *((title,) if title else _heading(source, total, is_plan)))
    return figure


def _heading(plan: Plan, selected: int, is_plan: bool) -> tuple[str, ...]:
    """How many were selected, and how many of how many the plan trains."""
    among = plan.backbone_numel or sum(info.numel for info in plan.info.values())
    lines = [
        f"Where the {selected:,} most sensitive of {among:,} parameters lie "
        f"({percent(selected, among)})"
    ]
    if is_plan:
        trained = f"trained: {plan.num_trainable:,} ({percent(plan.num_trainable, among)})"
        if plan.structured:
            module = "Adapters" if plan.kind == "adapter" else "LoRA"
            trained += (
                f": {plan.num_unstructured:,} single ones, {plan.num_structured:,} in {module} "
                "(corners)"
            )
        lines.append(trained)
    return tuple(lines)


def _draw_heat(
    axes: Axes,
    blocks: list[str],
    operations: list[str],
    cells: Mapping[tuple[str, str], Cell],
    share: Mapping[tuple[str, str], float],
    has_room: bool,
) -> Any:
    """The cells, with their numbers where there is room; the scale of the colours comes back."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    colours = LinearSegmentedColormap.from_list("ink", SHADES)
    highest = max(share.values())
    scale: Any = ScalarMappable(Normalize(0, highest), colours)
    for x, block in enumerate(blocks):
        for y, operation in enumerate(operations):
            if (block, operation) not in cells:
                continue
            value = share[block, operation]
            axes.add_patch(_square((x - 0.5, y - 0.5), scale.to_rgba(value)))
            if has_room:
                ink = "white" if value > 0.45 * highest else INK
                look = {**_NUMBERS, "color": ink}
                axes.text(x, y, _short(value), ha="center", va="center", **look)
    names = [short_block(block) for block in blocks]
    axes.set_xticks(range(len(blocks)), names)
    axes.set_yticks(range(len(operations)), operations)
    if len(blocks) > 16 or max(map(len, names)) * len(blocks) > 60:
        axes.tick_params(axis="x", rotation=90)
    axes.tick_params(length=0)
    axes.set_xlabel("block")
    axes.set_ylabel("operation")
    axes.spines[:].set_visible(False)
    return scale


def _draw_scale(axes: Axes, scale: Any) -> None:
    """A scale of the colours in an empty corner."""
    axes.set_axis_off()
    inset = axes.inset_axes((0.0, 0.45, 1.0, 0.2))
    axes.figure.colorbar(scale, cax=inset, orientation="horizontal")
    inset.tick_params(labelsize=7, colors=INK)
    inset.set_title("% in each cell", loc="left", fontsize=8, color=INK)


def _mark_structured(
    axes: Axes,
    blocks: list[str],
    operations: list[str],
    cells: Mapping[tuple[str, str], Cell],
    cell_width: float,
) -> None:
    """A corner of one form and size on each cell that a module is tuned in, however wide it is."""
    from matplotlib.path import Path

    at = [
        (x + 0.48, y - 0.46)
        for x, block in enumerate(blocks)
        for y, operation in enumerate(operations)
        if (block, operation) in cells and cells[block, operation].structured
    ]
    corner = Path([(0.0, 0.0), (-1.0, 0.0), (0.0, -1.0), (0.0, 0.0)])
    points = min(8.0, 0.32 * 72 * cell_width)
    if at:
        axes.plot(
            *zip(*at, strict=True), linestyle="none", marker=corner, markersize=2 * points,
            color=COLOURS[1], markeredgecolor=INK, markeredgewidth=0.4, label="structured",
        )  # fmt: skip


def _square(corner: tuple[float, float], colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, facecolor=colour, edgecolor="white", linewidth=1.2)


def _short(share: float) -> str:
    """At most three characters: `0`, `.4`, `7.2`, `31`."""
    if share >= 9.95:
        return f"{share:.0f}"
    text = f"{share:.1f}"
    return "0" if share == 0 else text.removeprefix("0") if text != "0.0" else "·"


def short_block(name: str) -> str:
    """`blocks.3` as `3`, `stages.2.blocks.1` as `2.1`, what is outside all blocks as `rest`."""
    return ".".join(re.findall(r"\d+", name)) or name or "rest"
