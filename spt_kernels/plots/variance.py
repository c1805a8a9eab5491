"""How much the places of sensitive parameters vary over tasks, by pre-training."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..plan import Plan
from ..sensitivity import Sensitivity
from .numbers import Numbers
from .selection import selections
from .shares import Axis, TaskShares, task_shares


@dataclass(frozen=True)
class TaskVariance(Numbers):
    """Variance over tasks of the share of each block and operation: the paper's Figure 9.

    Variances are of the tasks as a sample (divided by their number less one), of shares in per
    cent: their unit is the square of a percentage point.

    Attributes:
        tasks: those that every pre-training has.
        left_out: those that some lack.
        blocks: names of the blocks, `""` for what lies in none.
        operations: names of the operations.
        by_block: pre-training -> the variance of each block.
        by_operation: pre-training -> the variance of each operation.
    """

    tasks: tuple[str, ...]
    left_out: tuple[str, ...]
    blocks: tuple[str, ...]
    operations: tuple[str, ...]
    by_block: Mapping[str, tuple[float, ...]]
    by_operation: Mapping[str, tuple[float, ...]]

    def rows(self) -> list[dict[str, Any]]:
        """A row per pre-training and block, then per pre-training and operation."""
        sides = (
            ("block", self.blocks, self.by_block),
            ("operation", self.operations, self.by_operation),
        )
        return [
            {"pretraining": name, "axis": axis, "place": place, "variance": variance}
            for axis, places, variances in sides
            for name, own in variances.items()
            for place, variance in zip(places, own, strict=True)
        ]


def variance_over_tasks(
    pretrainings: Mapping[str, Mapping[str, Plan | Sensitivity]],
    budget: int | float | None = None,
) -> TaskVariance:
    """Compare how much tasks differ in what they find sensitive, on models pre-trained otherwise.

    Args:
        pretrainings: name -> task -> its plan or sensitivity; of one architecture. Tasks that not
            all of them have are left out, and named.
        budget: as `selection` has it.

    Raises:
        ValueError: fewer than two tasks that all have, different architectures, or as `selection`.
    """
    if not pretrainings:
        raise ValueError("pretrainings: expected at least one, got none")
    every = list(dict.fromkeys(task for tasks in pretrainings.values() for task in tasks))
    shared = [task for task in every if all(task in tasks for tasks in pretrainings.values())]
    if len(shared) < 2:
        raise ValueError(
            "pretrainings: expected at least two tasks that all of them have, got "
            f"{', '.join(shared) or 'none'} of {', '.join(every)}"
        )
    plans = {
        name: selections({task: tasks[task] for task in shared}, budget)
        for name, tasks in pretrainings.items()
    }
    of_block, of_operation = (
        {name: task_shares(own, axis) for name, own in plans.items()} for axis in _AXES
    )
    return TaskVariance(
        tasks=tuple(shared),
        left_out=tuple(task for task in every if task not in shared),
        blocks=_places(of_block),
        operations=_places(of_operation),
        by_block={name: _variances(shares) for name, shares in of_block.items()},
        by_operation={name: _variances(shares) for name, shares in of_operation.items()},
    )


_AXES: tuple[Axis, Axis] = ("block", "operation")


def _places(shares: Mapping[str, TaskShares]) -> tuple[str, ...]:
    (first, own), *others = shares.items()
    for name, other in others:
        if other.places != own.places:
            raise ValueError(
                f"pretrainings: {first!r} and {name!r} are of different architectures: their "
                f"{own.axis}s are {', '.join(own.places)}, and {', '.join(other.places)}"
            )
    return own.places


def _variances(shares: TaskShares) -> tuple[float, ...]:
    columns = zip(*shares.shares.values(), strict=True)
    return tuple(statistics.variance([100 * share for share in column]) for column in columns)
