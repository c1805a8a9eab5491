"""Draws accuracy against the samples that sensitivities are measured on: the paper's Table 8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..accuracy import AccuracyRow, AccuracyTable, labels
from .accuracy_axis import WHISKERS, accuracy_title, note_handle, seeds_note, whiskers
from .paper import finish, key_columns, paper_figure, put_key, series, width_of

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
    per_row = key_columns([*lines, *filter(None, [note])], width_of(columns), 2)
    figure = paper_figure(columns, 2.1 + 0.15 * len(lines) + 0.2 * bool(title), title)
    axes = figure.add_subplot()
    handles: list[Any] = []
    for number, (label, rows) in enumerate(lines.items()):
        handles.append(
            axes.errorbar(
                [row.settings["samples"] for row in rows],
                [100 * row.mean for row in rows],
                yerr=[whiskers(row) or 0.0 for row in rows] if note else None,
                label=label,
                **{**series(number), "markersize": 4.0},
                **WHISKERS,
            )
        )
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
