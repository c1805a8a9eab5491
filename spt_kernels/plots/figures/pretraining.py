"""Draws how much tasks differ in what is sensitive, by pre-training: the paper's Figure 9."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...files.picture import INK, LINE_COLOURS, put_title, shown_name
from ..variance import TaskVariance
from .block_axis import mark_blocks, places_of
from .paper import LETTERS, LONGEST, finish, key_columns, paper_figure, put_key, series, width_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oo")  # apart in print, too


def pretraining_figure(
    made: TaskVariance, *, columns: int | None = None, title: str | None = None
) -> Figure:
    """The variance over tasks of each block's share, and of each operation's.

    Args:
        made: of `variance_over_tasks`.
        columns: of a paper, 1 (panels below one another) or 2 (beside one another, the default).
        title: above it.
    """
    columns = columns or 2
    is_high = columns == 1
    names = [shown_name(name, LONGEST) for name in made.by_block]
    per_row = key_columns(names, width_of(columns), 3)
    below = 0.15 * (-(-len(names) // per_row) - 1)  # inches of a key's further lines
    figure = paper_figure(columns, (3.7 if is_high else 2.1) + below, title)
    blocks, operations = figure.subplots(*((2, 1) if is_high else (1, 2)))
    shown = [
        place
        for place, name in enumerate(made.blocks)
        if name or any(own[place] for own in made.by_block.values())
    ]
    handles = _draw_lines(blocks, made, shown)
    _draw_bars(operations, made.operations, made.by_operation)
    finish(blocks, operations)
    mark_blocks(blocks, [made.blocks[place] for place in shown], room=14)
    operations.set_xticks(range(len(made.operations)), made.operations)
    operations.set_xlabel("operation")
    if sum(map(len, made.operations)) > 40:
        operations.tick_params(axis="x", rotation=90)
    for axes in (blocks, operations) if is_high else (blocks,):
        axes.set_ylabel(f"variance over {len(made.tasks)} tasks,\n(% points)²")
    put_title(blocks, "share of each block", LETTERS)
    put_title(operations, "share of each operation", LETTERS)
    for axes in (blocks, operations):
        axes.set_ylim(bottom=0)
    if len(handles) > 1:
        put_key(figure, handles, per_row)
    return figure


def _draw_lines(axes: Axes, made: TaskVariance, shown: Sequence[int]) -> list[Any]:
    at = dict(zip(shown, places_of([made.blocks[place] for place in shown]), strict=True))
    inside = [place for place in shown if made.blocks[place]]
    outside = [place for place in shown if not made.blocks[place]]
    handles = []
    for number, (name, own) in enumerate(made.by_block.items()):
        look = series(number)
        for places in (inside, outside):
            line = axes.plot([at[p] for p in places], [own[p] for p in places], **look)
            handles += line if places is inside else []
        handles[-1].set_label(shown_name(name, LONGEST))
    return handles


def _draw_bars(axes: Axes, places: Sequence[str], variances: Mapping[str, Sequence[float]]) -> None:
    width = 0.8 / len(variances)
    for number, own in enumerate(variances.values()):
        shift = (number - (len(variances) - 1) / 2) * width
        axes.bar(
            [x + shift for x in range(len(places))], own, width=width,
            color=LINE_COLOURS[number % len(LINE_COLOURS)], edgecolor=INK, linewidth=0.4,
            hatch=_HATCHES[number % len(_HATCHES)],
        )  # fmt: skip
