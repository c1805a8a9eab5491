"""Draws accuracy against the samples that sensitivities are measured on: the paper's Table 8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..accuracy import AccuracyRow, AccuracyTable, labels
from .accuracy_axis import accuracy_title, draw_line, note_handle, seeds_note
from .paper import finish, in_key, key_columns, key_inches, paper_figure, put_key, width_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOG = 4  # the most over the fewest, from which on the scale is logarithmic


def samples_figure(
    made: AccuracyTable, *, columns: int | None = None, title: str | None = None
) -> Figure:
    """A line per method over the numbers of samples; whiskers are the standard error over seeds.

    Args:
        made: of `samples_ablation`.
        columns: of a paper, 1 (the default) or 2.
        title: above it.
    """
    lines: dict[str, list[AccuracyRow]] = {}
    for label, row in zip(labels(made.each, but=("samples",)), made.each, strict=True):
        lines.setdefault(label, []).append(row)
    note = seeds_note(made)
    columns = columns or 1
    names = [in_key(label, columns) for label in lines]
    shown = [*names, *filter(None, [note])]
    per_row = key_columns(shown, width_of(columns), 2)
    figure = paper_figure(columns, 2.1 + key_inches(shown, per_row), title)
    axes = figure.add_subplot()
    handles: list[Any] = []
    for number, (name, rows) in enumerate(zip(names, lines.values(), strict=True)):
        at = [row.settings["samples"] for row in rows]
        handles.append(draw_line(axes, rows, at, number, name, has_whiskers=bool(note)))
    finish(axes, grid="both")
    counts = sorted({row.settings["samples"] for row in made.each})
    if counts[-1] >= _LOG * counts[0]:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set_xlabel("samples that sensitivities are measured on")
    axes.set_ylabel(accuracy_title(made))
    axes.margins(x=0.08, y=0.15)
    put_key(figure, [*handles, *([note_handle(note)] if note else [])], per_row)
    return figure
