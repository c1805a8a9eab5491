"""How the most sensitive parameters of tasks are shared out over blocks or operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..plan import Plan
from ..plan.table import ordered
from ..sensitivity import Sensitivity
from .numbers import Numbers
from .selection import selected, selection, selections

Axis = Literal["block", "operation"]


@dataclass(frozen=True)
class TaskShares(Numbers):
    """How tasks share out their most sensitive parameters: the paper's Figures 4 to 8.

    Attributes:
        axis: `block` or `operation`: what the places are.
        places: names of the blocks (`""` is what lies in none) or operations, in the model's order.
        shares: task -> for each place its share of the task's selected parameters, which sum to 1.
        selected: task -> how many parameters it selects.
    """

    axis: Axis
    places: tuple[str, ...]
    shares: Mapping[str, tuple[float, ...]]
    selected: Mapping[str, int]

    def rows(self) -> list[dict[str, Any]]:
        """A row per task and place."""
        return [
            {"task": task, self.axis: place, "share": share, "selected": self.selected[task]}
            for task, shares in self.shares.items()
            for place, share in zip(self.places, shares, strict=True)
        ]


def share_by_block(
    source: Plan | Sensitivity, budget: int | float | None = None
) -> dict[str, float]:
    """Block -> the share of all selected parameters that lie in it; arguments as `selection`."""
    return _shares(selection(source, budget), "block")


def share_by_operation(
    source: Plan | Sensitivity, budget: int | float | None = None
) -> dict[str, float]:
    """Operation (q, k, v, proj, fc1, fc2, ..., bias, norm) -> its share, likewise."""
    return _shares(selection(source, budget), "operation")


def task_shares(
    tasks: Mapping[str, Plan | Sensitivity], axis: Axis, budget: int | float | None = None
) -> TaskShares:
    """The shares of several tasks of one model.

    Args:
        tasks: name -> its plan or sensitivity.
        axis: share them out by `"block"` or by `"operation"`.
        budget: as `selection` has it.

    Raises:
        ValueError: another axis, no tasks, tasks of different models, or as `selection`.
    """
    if axis not in ("block", "operation"):
        raise ValueError(f"axis: expected block or operation, got {axis!r}")
    plans = selections(tasks, budget)
    shares = {task: _shares(plan, axis) for task, plan in plans.items()}
    places = tuple(next(iter(shares.values())))
    return TaskShares(
        axis,
        places,
        {task: tuple(own[place] for place in places) for task, own in shares.items()},
        {task: selected(plan) for task, plan in plans.items()},
    )


def _shares(plan: Plan, axis: Axis) -> dict[str, float]:
    cells = plan.cells()
    names = [block if axis == "block" else operation for block, operation in cells]
    counts = dict.fromkeys(names if axis == "block" else ordered(names), 0)
    for name, cell in zip(names, cells.values(), strict=True):
        counts[name] += cell.selected
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()}
