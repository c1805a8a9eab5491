"""The axis of accuracies, and what its whiskers and dots are."""

from __future__ import annotations

from typing import Any

from ...files.picture import INK, shown_name
from ..accuracy import AccuracyRow, AccuracyTable


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
