"""The axis of accuracies, and its lines with their whiskers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...files.picture import INK, shown_name
from ..accuracy import AccuracyRow, AccuracyTable
from .paper import series

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def accuracy_title(made: AccuracyTable) -> str:
    """What the accuracies are of, with their unit."""
    text = f"{made.images} accuracy, %"
    if len(made.tasks) == 1:
        return f"{text}\non {shown_name(made.tasks[0])}"
    return f"mean {text}\nover {len(made.tasks)} tasks"


def seeds_note(made: AccuracyTable) -> str:
    """What the whiskers are, for a key; empty where there are none."""
    counts = {len(row.seeds) for row in made.each}
    if max(counts) == 1:
        return ""
    low, high = min(counts), max(counts)
    return f"± standard error, {low if low == high else f'{low}–{high}'} seeds"


def whiskers(row: AccuracyRow) -> float | None:
    """The standard error in per cent, `None` of a single seed."""
    return None if row.standard_error is None else 100 * row.standard_error


WHISKERS: dict[str, Any] = {"capsize": 1.8, "elinewidth": 0.8, "capthick": 0.8}


def draw_line(
    axes: Axes,
    rows: Sequence[AccuracyRow],
    at: Sequence[float],
    number: int,
    label: str,
    *,
    has_whiskers: bool,
) -> Any:
    """The line of some rows, each at its place, as the series of that number; it is the handle."""
    made = axes.errorbar(
        at,
        [100 * row.mean for row in rows],
        yerr=[whiskers(row) or math.nan for row in rows] if has_whiskers else None,
        label=label,
        **{**series(number), "markersize": 4.0},
        **WHISKERS,
    )
    for cap in made.lines[1]:  # they took the edge of the marks, which have none
        cap.set_markeredgewidth(WHISKERS["capthick"])
    return made


_NOTE: dict[str, Any] = {
    "color": INK,
    "linestyle": "none",
    "marker": "|",
    "markersize": 7,
    "markeredgewidth": 0.8,
}


def note_handle(text: str) -> Any:
    """An entry of a key for the whiskers."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=text, **_NOTE)
