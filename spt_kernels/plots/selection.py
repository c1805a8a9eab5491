"""Which parameters a task selects (Eq. 4), read from a plan or chosen by a sensitivity."""

from __future__ import annotations

from collections.abc import Mapping

from ..methods.method import DEFAULT_BUDGET
from ..plan import Plan, allocate
from ..sensitivity import Sensitivity


def selection(source: Plan | Sensitivity, budget: int | float | None = None) -> Plan:
    """A plan whose `selected` counts the most sensitive parameters of each matrix (Eq. 4).

    Args:
        source: a plan, which is returned as it is; or scores, of which the `budget` highest are
            selected, whatever a LoRA would cost.
        budget: with scores, a count, or a share of the backbone in (0, 1); 0.5 % without one.

    Raises:
        ValueError: a budget beside a plan, or a plan that was made without a sensitivity.
    """
    if isinstance(source, Sensitivity):
        return allocate(source, DEFAULT_BUDGET if budget is None else budget, structured=None)
    if budget is not None:
        raise ValueError(
            f"budget: a plan has spent its own, {source.budget:,}, got {budget:,}: give the "
            "sensitivity in its place, or leave the budget out"
        )
    if not selected(source):
        raise ValueError(
            "tasks: expected a plan that a sensitivity made, got one without counts of selected "
            "parameters"
        )
    return source


def selected(plan: Plan) -> int:
    """How many parameters it selects."""
    return sum(map(sum, plan.selected.values()))


def selections(
    tasks: Mapping[str, Plan | Sensitivity], budget: int | float | None = None
) -> dict[str, Plan]:
    """`selection` of each task; `ValueError` as that, and if they are not of one architecture."""
    if not tasks:
        raise ValueError("tasks: expected at least one, got none")
    plans = {task: selection(source, budget) for task, source in tasks.items()}
    (first, own), *others = plans.items()
    shapes = {name: info.shape for name, info in own.info.items()}
    for task, plan in others:
        theirs = {name: info.shape for name, info in plan.info.items()}
        for name in (*shapes, *theirs):
            if shapes.get(name) != theirs.get(name):
                raise ValueError(
                    f"tasks: {first!r} and {task!r} are of different models: {name} is "
                    f"{_told(shapes.get(name))} in one, {_told(theirs.get(name))} in the other"
                )
    return plans


def _told(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " × ".join(map(str, shape)) or "a single number"
