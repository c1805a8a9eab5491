"""Draws accuracy with and without structured and unstructured tuning: the paper's Table 6."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from ...files.picture import INK, LINE_COLOURS, shown_name
from ...methods.method import entry_of
from ..accuracy import AccuracyRow, AccuracyTable, labels
from .accuracy_axis import WHISKERS, seeds_note, whiskers
from .paper import SMALL, finish, paper_figure, short_count, width_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LETTERS = {1: 24, 2: 54}  # of a line of a name, in so many columns
_MODULES = {"lora": "LoRA", "adapter": "Adapter", None: "–"}


def structure_figure(
    made: AccuracyTable, *, columns: int | None = None, title: str | None = None
) -> Figure:
    """A row per method: what it trains, how much, and its accuracy with the standard error.

    Args:
        made: of `structure_ablation`.
        columns: of a paper, 1 or 2; by default as many as the names need.
        title: above it.
    """
    names = labels(made.each)
    columns = columns or (1 if max(map(len, names)) <= _LETTERS[1] else 2)
    width_of(columns)  # or refuses
    names = [textwrap.fill(name, _LETTERS[columns], break_on_hyphens=False) for name in names]
    lines = 1 + max(name.count("\n") for name in names)
    figure = paper_figure(columns, 1.05 + (0.1 + 0.12 * lines) * len(names), title)
    table, axes = figure.subplots(1, 2, sharey=True, width_ratios=(1.7, 1))
    for y, row in enumerate(made.each):
        look: dict[str, Any] = {"color": LINE_COLOURS[0], "marker": "o", "markersize": 4}
        axes.errorbar(100 * row.mean, y, xerr=whiskers(row), linestyle="none", **look, **WHISKERS)
        axes.annotate(
            f"{100 * row.mean:.1f}", (100 * row.mean, y), (0, 4), textcoords="offset points",
            ha="center", va="bottom", fontsize=SMALL - 0.5, color=INK,
        )  # fmt: skip
        _write(table, y, _texts(row), SMALL)
    finish(axes, grid="x")
    finish(table)
    axes.margins(x=0.2)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("accuracy, %")
    n_tasks = len(made.tasks)
    over = shown_name(made.tasks[0]) if n_tasks == 1 else f"mean over {n_tasks} tasks"
    note = "\n".join(filter(None, (f"{made.images} images, {over}", seeds_note(made))))
    figure.supxlabel(note, fontsize=SMALL, color=INK)
    table.set_yticks(range(len(names)), names)
    table.set_ylim(len(made.each) - 0.4, -1.1)
    table.set_xlim(0, 3)
    table.grid(False)
    table.spines[:].set_visible(False)
    table.tick_params(length=0, labelbottom=False)
    _write(table, -0.85, ("module", "entries", "trained"), SMALL)
    return figure


def _texts(row: AccuracyRow) -> tuple[str, str, str]:
    entry = entry_of(row.method)
    entries = "yes" if "entries" in (entry.holds or ()) else "–"
    return _MODULES[entry.structured], entries, short_count(row.trained)


def _write(table: Any, y: float, texts: tuple[str, str, str], letters: float) -> None:
    for x, text in enumerate(texts):
        table.text(x + 0.5, y, text, ha="center", va="center", fontsize=letters, color=INK)
