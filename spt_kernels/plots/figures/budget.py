"""Draws accuracy against the number of trained parameters: the paper's Figure 3a."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...methods.method import METHODS
from ..accuracy import AccuracyRow, AccuracyTable, telling
from .accuracy_axis import accuracy_title, draw_line, note_handle, seeds_note
from .paper import (
    finish,
    in_key,
    key_columns,
    key_inches,
    paper_figure,
    put_key,
    series,
    short_count,
    width_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOG = 8  # the largest over the smallest, from which on the scale is logarithmic


def budget_figure(
    made: AccuracyTable, *, columns: int | None = None, title: str | None = None
) -> Figure:
    """A line per method over its sizes; whiskers are the standard error over seeds.

    A method that trains the head alone, or half of the model and more, is a level that all others
    can be held against. Methods that differ in the number in their name alone, as `lora-8` and
    `lora-16`, are one line; what was measured or decided otherwise, on other samples, by another
    rule, or with modules of another rank within a budget, is a line of its own.

    Args:
        made: of `accuracy_by_budget`.
        columns: of a paper, 1 (the default) or 2.
        title: above it.
    """
    columns = columns or 1
    lines = _lines(made)
    note = seeds_note(made)
    names = [in_key(label, columns) for label in lines]
    shown = [*names, *filter(None, [note])]
    per_row = key_columns(shown, width_of(columns), 2 if columns == 1 else 4)
    figure = paper_figure(columns, 2.2 + key_inches(shown, per_row), title)
    axes = figure.add_subplot()
    handles: list[Any] = []
    for number, (name, rows) in enumerate(zip(names, lines.values(), strict=True)):
        if _has_a_place(rows[0], made.backbone):
            at = [row.trained for row in rows]
            handles.append(draw_line(axes, rows, at, number, name, has_whiskers=bool(note)))
        else:
            handles.append(_draw_level(axes, rows[0], number, name))
    finish(axes, grid="both")
    _scale_parameters(axes, [row.trained for row in made.each if _has_a_place(row, made.backbone)])
    axes.set_ylabel(accuracy_title(made))
    put_key(figure, [*handles, *([note_handle(note)] if note else [])], per_row)
    return figure


def _lines(made: AccuracyTable) -> dict[str, list[AccuracyRow]]:
    """The rows of each line, and each level alone, by what the key calls it."""
    lines: dict[tuple[str, ...], list[AccuracyRow]] = {}
    for row in made.each:
        alike = [other for other in made.each if other.family == row.family]
        has_place = _has_a_place(row, made.backbone)
        name = row.family if has_place else row.method
        sizes = _sizes(row) if has_place else ()
        lines.setdefault((name, *telling(row, alike, sizes)), []).append(row)
    named = {}
    for (name, *besides), rows in lines.items():
        own = rows[0].method if len({row.method for row in rows}) == 1 else name
        label = ", ".join([own, *besides])
        is_large = rows[0].trained and not _has_a_place(rows[0], made.backbone)
        named[f"{label} ({short_count(rows[0].trained)})" if is_large else label] = rows
    return named


def _sizes(row: AccuracyRow) -> tuple[str, ...]:
    """The settings that make a method larger; the rank of modules within a budget does not."""
    entry = METHODS.get(row.family)
    is_aware = entry is not None and "samples" in entry.options
    return ("budget",) if is_aware else ("budget", "rank")


def _has_a_place(row: AccuracyRow, backbone: int) -> bool:
    """Whether its size is one that the others' can be compared with."""
    return 0 < row.trained < backbone / 2


def _draw_level(axes: Axes, row: AccuracyRow, number: int, label: str) -> Any:
    look = {name: series(number)[name] for name in ("color", "linestyle")}
    return axes.axhline(100 * row.mean, label=label, linewidth=0.8, **look)


def _scale_parameters(axes: Axes, trained: list[float]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axes.set_xlabel("trained parameters, without the head")
    if not trained:
        axes.set_xticks([])
    elif max(trained) >= _LOG * min(trained):
        axes.set_xscale("log")
        is_wide = max(trained) > 30 * min(trained)
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1,) if is_wide else (1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(lambda count, _: short_count(count))
    axes.margins(x=0.08, y=0.12)
