"""Draws accuracy against the number of trained parameters: the paper's Figure 3a."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..accuracy import AccuracyRow, AccuracyTable
from .accuracy_axis import WHISKERS, accuracy_title, note_handle, seeds_note, whiskers
from .paper import finish, key_columns, paper_figure, put_key, series, short_count, width_of

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
    `lora-16`, are one line.

    Args:
        made: of `accuracy_by_budget`.
        columns: of a paper, 1 (the default) or 2.
        title: above it.
    """
    columns = columns or 1
    lines: dict[str, list[AccuracyRow]] = {}
    for row in made.each:
        lines.setdefault(_named(row.family, row), []).append(row)
    note = seeds_note(made)
    labels = [_label(name, rows, made.backbone) for name, rows in lines.items()]
    names = [*labels, *filter(None, [note])]
    per_row = key_columns(names, width_of(columns), 2 if columns == 1 else 4)
    key_lines = -(-len(names) // per_row)
    figure = paper_figure(columns, 2.2 + 0.15 * key_lines + 0.2 * bool(title), title)
    axes = figure.add_subplot()
    handles: list[Any] = []
    for number, (label, rows) in enumerate(zip(labels, lines.values(), strict=True)):
        if not any(_has_a_place(row, made.backbone) for row in rows):
            handles.append(_draw_level(axes, rows[0], number, label))
            continue
        handles.append(
            axes.errorbar(
                [row.trained for row in rows],
                [100 * row.mean for row in rows],
                yerr=[whiskers(row) or 0.0 for row in rows] if note else None,
                label=label,
                **{**series(number), "markersize": 4.0},
                **WHISKERS,
            )
        )
    finish(axes, grid="both")
    _scale_parameters(axes, [row.trained for row in made.each if _has_a_place(row, made.backbone)])
    axes.set_ylabel(accuracy_title(made))
    put_key(figure, [*handles, *([note_handle(note)] if note else [])], per_row)
    return figure


def _named(name: str, row: AccuracyRow) -> str:
    """With what was chosen for each task, which is another line than what was not."""
    return f"{name}, {' and '.join(row.chosen)} chosen" if row.chosen else name


def _label(name: str, rows: Sequence[AccuracyRow], backbone: int) -> str:
    """What the key calls the line of these rows, or their level: a family, or its one method."""
    first = rows[0]
    if not any(_has_a_place(row, backbone) for row in rows):
        return f"{first.method} ({short_count(first.trained)})" if first.trained else first.method
    is_one = len({row.method for row in rows}) == 1
    return _named(first.method, first) if is_one else name


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
