"""Accounted peaks as stacked bars, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..files.picture import FAINT, INK, PARTS, dress, new_figure, put_heading, put_legend
from .estimate import MemoryEstimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MADE_UP = "* by made-up scores, as skewed as measured ones"


def memory_figure(
    estimates: Sequence[MemoryEstimate] | Mapping[str, MemoryEstimate], *, title: str | None = None
) -> Figure:
    """Memory at the moment of the peak by category, one stacked bar per estimate.

    A star marks what was chosen by made-up scores.

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
    figure = new_figure(1.5 + 0.28 * len(estimates))
    axes = figure.add_subplot()
    places = range(len(estimates))
    lefts = [0.0] * len(estimates)
    bars = []
    for colour, category in zip(PARTS, next(iter(estimates.values())).by_category, strict=True):
        widths = [e.by_category[category] / unit for e in estimates.values()]
        bars.append(
            axes.barh(
                places, widths, left=lefts, label=category, height=0.7,
                facecolor=colour, edgecolor=INK, linewidth=0.5,
            )
        )  # fmt: skip
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for place, peak in enumerate(lefts):
        axes.annotate(
            f"{peak:.2f}", (peak, place), (4, 0), textcoords="offset points", va="center",
            fontsize=8.5, color=INK,
        )  # fmt: skip
    stars = ["*" if e.made_up_scores else "" for e in estimates.values()]
    axes.set_yticks(places, [f"{key}{star}" for key, star in zip(estimates, stars, strict=True)])
    axes.set_ylim(len(estimates) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * max(lefts))
    dress(axes)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    note = f"\n{MADE_UP}" if any(stars) else ""
    axes.set_xlabel(f"memory at the moment of the peak, {name} (accounted){note}")
    put_legend(figure, bars, len(bars))
    first = next(iter(estimates.values()))
    step = "training step" if first.training else "inference"
    shape = " × ".join(map(str, first.batch_shape))
    put_heading(figure, title or f"{step} on {shape}, {first.dtype}")
    return figure


def _unique(estimates: Sequence[MemoryEstimate], place: int) -> str:
    estimate = estimates[place]
    same = [e for e in estimates if e.method == estimate.method]
    if len(same) == 1:
        return estimate.method
    if len({e.dtype for e in same}) == len(same):
        return f"{estimate.method} {estimate.dtype}"
    return f"{place + 1}. {estimate.method}"
