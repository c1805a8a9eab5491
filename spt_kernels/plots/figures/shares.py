"""Draws where tasks have their most sensitive parameters: the paper's Figures 4 to 8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...files.picture import put_title, shown_name
from ..shares import TaskShares
from .block_axis import mark_blocks, places_of
from .paper import (
    LETTERS,
    LONGEST,
    finish,
    key_columns,
    paper_figure,
    put_key,
    series,
    short_count,
    width_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TASKS = 6  # lines of a panel, as in the paper; more are hard to follow
_PANEL = 1.75  # inches, without its key


def shares_figure(
    made: TaskShares | Mapping[str, TaskShares],
    *,
    columns: int | None = None,
    title: str | None = None,
) -> Figure:
    """A line per task over the blocks or operations, at most six to a panel.

    Args:
        made: of `task_shares`; or by name, as of models pre-trained otherwise, a panel or several
            for each.
        columns: of a paper, 1 or 2; by default 1 for a single panel.
        title: above it.
    """
    named = {"": made} if isinstance(made, TaskShares) else dict(made)
    if not named:
        raise ValueError("made: expected the shares of at least one task, got none")
    if len({own.axis for own in named.values()}) > 1:
        raise ValueError("made: expected all by block or all by operation, got both")
    panels = [_Panel(name, own, tasks) for name, own in named.items() for tasks in _sixes(own)]
    columns = columns or (1 if len(panels) == 1 else 2)
    across = 1 if columns == 1 else min(len(panels), 2 if len(panels) in (2, 4) else 3)
    down = -(-len(panels) // across)
    # one key for all where all are of the same tasks, else one below each
    is_shared = len({tuple(panel.tasks) for panel in panels}) == 1
    most = (6 if across > 1 else 3) if is_shared else (2 if across == 3 else 3)
    width = width_of(columns) / (1 if is_shared else across)
    per_row = min(key_columns(panel.names, width, most) for panel in panels)
    key = 0.15 * -(-max(len(panel.tasks) for panel in panels) // per_row)  # inches
    height = key + down * _PANEL if is_shared else down * (key + _PANEL)
    figure = paper_figure(columns, height, title)
    grid = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    handles: list[Any] = []
    for axes, panel in zip(grid, panels, strict=False):
        handles = panel.draw(axes, room=14 if across < 3 else 8)
        if len(handles) > 1 and not is_shared:
            put_key(axes, handles, per_row)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[::across]:
        axes.set_ylabel(_unit(named))
        axes.set_ylim(bottom=0)
    if len(handles) > 1 and is_shared:
        put_key(figure, handles, per_row)
    return figure


@dataclass(frozen=True)
class _Panel:
    name: str
    own: TaskShares
    tasks: list[str]

    @property
    def names(self) -> list[str]:
        """Of the tasks, as its key has them."""
        return [shown_name(task, LONGEST) for task in self.tasks]

    def draw(self, axes: Axes, room: int) -> list[Any]:
        """The lines of its tasks, which come back for the key; `room` for names of places."""
        handles = _draw(axes, self.own, self.tasks)
        if self.name:
            put_title(axes, shown_name(self.name, LONGEST), LETTERS)
        finish(axes)
        _name_places(axes, self.own, room)
        return handles


def _draw(axes: Axes, own: TaskShares, tasks: list[str]) -> list[Any]:
    """The lines of some tasks; what lies in no block is a mark that no line leads to."""
    shown = _shown(own)
    at = places_of(shown)
    inside = [number for number, place in enumerate(shown) if place]
    outside = [number for number, place in enumerate(shown) if not place]
    handles = []
    for number, task in enumerate(tasks):
        share = dict(zip(own.places, own.shares[task], strict=True))
        percent = [100 * share[place] for place in shown]
        look = series(number)
        if own.axis == "operation":
            look["linewidth"] = 0.7
        for numbers in (inside, outside):
            line = axes.plot([at[x] for x in numbers], [percent[x] for x in numbers], **look)
            handles += line if numbers is inside else []
        handles[-1].set_label(shown_name(task, LONGEST))
    return handles


def _name_places(axes: Axes, own: TaskShares, room: int) -> None:
    shown = _shown(own)
    if own.axis == "block":
        mark_blocks(axes, shown, room)
        return
    axes.set_xlim(-0.5, len(shown) - 0.5)
    axes.set_xticks(range(len(shown)), shown)
    axes.set_xlabel("operation")
    if sum(map(len, shown)) > 4 * room:
        axes.tick_params(axis="x", rotation=90)


def _shown(own: TaskShares) -> list[str]:
    """The places, without what lies in no block where nothing is selected there."""
    used = {place for each in own.shares.values()
            for place, share in zip(own.places, each, strict=True) if share}  # fmt: skip
    return [place for place in own.places if place or place in used]


def _sixes(own: TaskShares) -> list[list[str]]:
    """The tasks, as evenly as it goes, in panels of at most six."""
    tasks = list(own.shares)
    panels = -(-len(tasks) // TASKS)
    size = -(-len(tasks) // panels)
    return [tasks[at : at + size] for at in range(0, len(tasks), size)]


def _unit(named: Mapping[str, TaskShares]) -> str:
    counts = {count for own in named.values() for count in own.selected.values()}
    many = f"{short_count(counts.pop())} " if len(counts) == 1 else ""
    return f"% of the {many}most\nsensitive parameters"
