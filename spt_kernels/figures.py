"""Pictures of plans, trainings and memory, as matplotlib figures to show or save."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from .allocation import allocate
from .memory import MemoryEstimate
from .plan import Cell, Plan
from .plan_table import ordered
from .sensitivity import Sensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# stays apart for colour-blind readers (Okabe and Ito, 2008)
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#777777")
INK = "#24292f"
FAINT = "#d0d7de"
WIDTH = 9.0  # inches; at 150 dpi as wide as a README shows


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
    figure = _figure(WIDTH, height)
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
    _dress(heat, above, beside)
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


def training_curves_figure(
    records: Mapping[str, Sequence[Any]] | Sequence[Any], *, title: str | None = None
) -> Figure:
    """Training loss and accuracy over the epochs, one line per run.

    Args:
        records: the epochs of one run, or of several by name. An epoch is a mapping or dataclass
            with `epoch`, `train_loss`, and `val_accuracy` (0 to 1) where there is one.
        title: above both panels.
    """
    runs = records if isinstance(records, Mapping) else {"": records}
    runs = {name: [_as_mapping(epoch) for epoch in epochs] for name, epochs in runs.items()}
    if not any(runs.values()):
        raise ValueError("records must hold at least one epoch, got none")
    figure = _figure(WIDTH, 3.3)
    left, right = figure.subplots(1, 2)
    styles = ("-", "--", "-.", ":")
    for place, (name, epochs) in enumerate(runs.items()):
        look = {
            "color": COLOURS[place % len(COLOURS)],
            "linestyle": styles[place // len(COLOURS) % len(styles)],
            "label": name,
            "marker": "o" if len(epochs) < 12 else None,
            "markersize": 3.5,
        }
        left.plot([e["epoch"] for e in epochs], [e["train_loss"] for e in epochs], **look)
        seen = [e for e in epochs if e.get("val_accuracy") is not None]
        if seen:
            right.plot([e["epoch"] for e in seen], [100 * e["val_accuracy"] for e in seen], **look)
    _dress(left, right)
    _head(left, "training loss (cross entropy)")
    _head(right, "validation accuracy, %")
    if not right.lines:
        right.text(0.5, 0.5, "no validation", ha="center", color=INK, transform=right.transAxes)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color=FAINT, linewidth=0.6)
    if len(runs) > 1:
        figure.legend(
            *left.get_legend_handles_labels(),
            loc="outside right center",
            frameon=False,
            fontsize=9,
            labelcolor=INK,
        )
    if title:
        figure.suptitle(title, fontsize=10.5, color=INK)
    return figure


def memory_figure(
    estimates: Sequence[MemoryEstimate] | Mapping[str, MemoryEstimate], *, title: str | None = None
) -> Figure:
    """Peak memory by category, one stacked bar per estimate.

    Args:
        estimates: in the order to draw them, from the top; a mapping's keys are their labels,
            otherwise their methods are.
        title: instead of the one that names the batch and dtype.
    """
    if not isinstance(estimates, Mapping):
        estimates = {_unique(estimates, place): e for place, e in enumerate(estimates)}
    if not estimates:
        raise ValueError("estimates must hold at least one estimate, got none")
    largest = max(e.peak_bytes for e in estimates.values())
    unit, name = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
    figure = _figure(WIDTH, 1.3 + 0.42 * len(estimates))
    axes = figure.add_subplot()
    labels = list(estimates)
    lefts = [0.0] * len(labels)
    categories = list(next(iter(estimates.values())).by_category)
    palette = [*COLOURS[:3], COLOURS[4], "#9a9a9a", COLOURS[3]]  # the largest two are the calmest
    for colour, category in zip(palette, categories, strict=False):
        widths = [e.by_category[category] / unit for e in estimates.values()]
        axes.barh(labels, widths, left=lefts, color=colour, label=category, height=0.68)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for place, peak in enumerate(lefts):
        axes.annotate(
            f"{peak:.2f}", (peak, place), (4, 0), textcoords="offset points", va="center", color=INK
        )
    axes.invert_yaxis()
    axes.margins(x=0.09)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_xlabel(f"peak memory, {name} (accounted)")
    figure.legend(
        loc="outside upper center", ncols=len(categories), frameon=False, fontsize=9, labelcolor=INK
    )
    first = next(iter(estimates.values()))
    step = "training step" if first.training else "inference"
    shape = " × ".join(map(str, first.batch_shape))
    _dress(axes)
    _head(axes, title or f"{step} on {shape}, {first.dtype}")
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


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install 'spt_kernels[cli]' brings it"
        ) from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _dress(*every: Axes) -> None:
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[:].set_color(INK)
        axes.tick_params(labelsize=8.5, colors=INK)
        axes.xaxis.label.set(size=9, color=INK)
        axes.set_axisbelow(True)


def _head(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, color=INK)


def _as_mapping(epoch: Any) -> Mapping[str, Any]:
    if is_dataclass(epoch) and not isinstance(epoch, type):
        return asdict(epoch)
    return epoch


def _unique(estimates: Sequence[MemoryEstimate], place: int) -> str:
    estimate = estimates[place]
    same = [e for e in estimates if e.method == estimate.method]
    if len(same) == 1:
        return estimate.method
    if len({e.dtype for e in same}) == len(same):
        return f"{estimate.method} {estimate.dtype}"
    return f"{place + 1}. {estimate.method}"


def _short(percent: float) -> str:
    """At most three characters: `0`, `.4`, `7.2`, `31`."""
    if percent >= 9.95:
        return f"{percent:.0f}"
    text = f"{percent:.1f}"
    return "0" if percent == 0 else text.removeprefix("0") if text != "0.0" else "·"


def _short_block(name: str) -> str:
    """`blocks.3` as `3`, `stages.2.blocks.1` as `2.1`, what is outside all blocks as `rest`."""
    return ".".join(re.findall(r"\d+", name)) or name or "rest"
