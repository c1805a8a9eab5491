"""Accounted peaks as stacked bars, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..files.picture import COLOURS, FAINT, INK, dress, new_figure, put_title
from .estimate import MemoryEstimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    figure = new_figure(1.3 + 0.42 * len(estimates))
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
    dress(axes)
    put_title(axes, title or f"{step} on {shape}, {first.dtype}")
    return figure


def _unique(estimates: Sequence[MemoryEstimate], place: int) -> str:
    estimate = estimates[place]
    same = [e for e in estimates if e.method == estimate.method]
    if len(same) == 1:
        return estimate.method
    if len({e.dtype for e in same}) == len(same):
        return f"{estimate.method} {estimate.dtype}"
    return f"{place + 1}. {estimate.method}"
