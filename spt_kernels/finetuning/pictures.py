"""The pictures of a run: where the sensitive parameters are, how training went."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..plan import Plan
from .training import EpochFigures

# A palette that stays apart for colour-blind readers and in grey (Okabe & Ito, 2008)
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_INK = "#333333"


def draw_sensitivity(plan: Plan, path: str | os.PathLike[str], title: str = "") -> None:
    """Draw the share of the most sensitive parameters by block and by operation (Figure 4)."""
    by_block, by_operation = sensitive_shares(plan)
    operations = list(by_operation)
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(operations)}
    figure = Figure(figsize=(9.6, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    places = range(len(by_block))
    base = [0.0] * len(by_block)
    for name in operations:
        heights = [100 * shares.get(name, 0.0) for shares in by_block.values()]
        left.bar(places, heights, bottom=base, color=colours[name], label=name, width=0.75)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    left.set_xticks(list(places), [_short_block(name) for name in by_block])
    left.tick_params(axis="x", rotation=45 if len(by_block) > 14 else 0)
    _dress(left, "by block", "share of the selected parameters, %")
    left.set_xlabel("block")
    values = [100 * share for share in by_operation.values()]
    right.barh(operations, values, color=[colours[name] for name in operations])
    right.invert_yaxis()
    for place, value in enumerate(values):
        right.annotate(
            f"{value:.1f}", (value, place), (3, 0), textcoords="offset points", va="center"
        )
    right.margins(x=0.12)
    _dress(right, "by operation", "")
    right.set_xlabel("share of the selected parameters, %")
    right.grid(axis="y", visible=False)
    total = sum(sum(counts) for counts in plan.selected.values())
    figure.suptitle(title or f"Where the {total:,} most sensitive parameters are", color=_INK)
    figure.savefig(path)


def sensitive_shares(plan: Plan) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Shares of the selected parameters: block -> operation -> share, and operation -> share."""
    cells = plan.cells()
    total = sum(cell.selected for cell in cells.values()) or 1
    by_block: dict[str, dict[str, float]] = {}
    by_operation: dict[str, float] = {}
    for (block, operation), cell in cells.items():
        share = cell.selected / total
        by_block.setdefault(block, {})[operation] = share
        by_operation[operation] = by_operation.get(operation, 0.0) + share
    return by_block, by_operation


def draw_curves(runs: Mapping[str, Sequence[EpochFigures]], path: str | os.PathLike[str]) -> None:
    """Draw training loss and validation accuracy over the epochs, one line per run."""
    figure = Figure(figsize=(9.6, 3.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (name, rows) in enumerate(runs.items()):
        colour = _COLOURS[place % len(_COLOURS)]
        left.plot([r.epoch for r in rows], [r.train_loss for r in rows], color=colour, label=name)
        seen = [(r.epoch, 100 * r.val_accuracy) for r in rows if r.val_accuracy is not None]
        if seen:
            right.plot(*zip(*seen, strict=True), color=colour, label=name)
    _dress(left, "training loss", "cross entropy")
    _dress(right, "validation accuracy", "top-1, %")
    for axes in (left, right):
        axes.set_xlabel("epoch")
    if not right.lines:
        right.text(0.5, 0.5, "no validation images", ha="center", transform=right.transAxes)
    if len(runs) > 1:
        left.legend(frameon=False)
    figure.savefig(path)


def _dress(axes: Axes, title: str, y_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.set_ylabel(y_label)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _short_block(name: str) -> str:
    """`blocks.3` as `3`, `stages.2.blocks.1` as `2.1`; what is outside all blocks as `–`."""
    return ".".join(re.findall(r"\d+", name)) or name or "–"
