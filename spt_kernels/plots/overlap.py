"""How alike the selections of two tasks are, beside what chance gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..model import ParameterInfo
from ..plan import Plan
from ..sensitivity import Sensitivity
from .numbers import Numbers
from .selection import selected, selections


@dataclass(frozen=True)
class Overlap:
    """Two selections among the same parameters.

    Attributes:
        first: a task.
        second: another.
        parameter: the matrix or vector that is looked at; empty for the whole model.
        operation: of its rows, as `q` of a fused qkv; empty for the whole model.
        first_selected: how many parameters the first task selects here.
        second_selected: how many the second selects.
        shared: how many both select.
        by_chance: how many both would be expected to select if each drew as many of every matrix
            (or vector) as it selects there.
    """

    first: str
    second: str
    parameter: str
    operation: str
    first_selected: int
    second_selected: int
    shared: int
    by_chance: float

    @property
    def jaccard(self) -> float:
        """What both select, as a share of what either does."""
        return self._share(self.shared)

    @property
    def chance(self) -> float:
        """`jaccard` of selections that share `by_chance` parameters."""
        return self._share(self.by_chance)

    @property
    def over_chance(self) -> float | None:
        """How many times chance; None where chance is 0."""
        return self.jaccard / self.chance if self.chance else None

    def row(self) -> dict[str, Any]:
        """As a row of a table."""
        more = {name: getattr(self, name) for name in ("jaccard", "chance", "over_chance")}
        return asdict(self) | more

    def _share(self, shared: float) -> float:
        either = self.first_selected + self.second_selected - shared
        return shared / either if either else 0.0


@dataclass(frozen=True)
class SelectionOverlap(Numbers):
    """How alike the selections of tasks are.

    Attributes:
        tasks: in the order given.
        selected: task -> how many parameters it selects.
        pairs: every two tasks, over the whole model.
        matrices: every two tasks, by matrix (q, k and v of a fused one apart) and vector, where
            either selects anything.
    """

    tasks: tuple[str, ...]
    selected: Mapping[str, int]
    pairs: tuple[Overlap, ...]
    matrices: tuple[Overlap, ...]

    def rows(self) -> list[dict[str, Any]]:
        """A row per pair, then a row per pair and matrix."""
        return [overlap.row() for overlap in (*self.pairs, *self.matrices)]

    def to_json(self) -> dict[str, Any]:
        """As JSON values, with shares beside the counts."""
        return {
            "tasks": list(self.tasks),
            "selected": dict(self.selected),
            "pairs": [overlap.row() for overlap in self.pairs],
            "matrices": [overlap.row() for overlap in self.matrices],
        }


def selection_overlap(
    tasks: Mapping[str, Plan | Sensitivity], budget: int | float | None = None
) -> SelectionOverlap:
    """Compare what every two of some tasks select (Eq. 4).

    Args:
        tasks: name -> its sensitivity, or a plan that holds every selected position: one with
            `structured=None`, since a matrix with a LoRA is not known entry by entry.
        budget: as `selection` has it.

    Raises:
        ValueError: fewer than two tasks, tasks of different models, a plan that does not hold what
            it selected, or as `selection`.
    """
    if len(tasks) < 2:
        raise ValueError(f"tasks: expected at least two to compare, got {len(tasks)}")
    plans = selections(tasks, budget)
    info = next(iter(plans.values())).info
    parts = {task: _positions(task, plan) for task, plan in plans.items()}
    found: list[Overlap] = []
    for name in info:
        for place, block in enumerate(info[name].row_blocks):
            numel = (block.stop - block.start) * _row_numel(info[name])
            own = {task: positions[name, place] for task, positions in parts.items()}
            found += _in_matrix(own, name, block.operation, numel)
    pairs = tuple(
        _whole([o for o in found if (o.first, o.second) == pair]) for pair in combinations(plans, 2)
    )
    return SelectionOverlap(
        tasks=tuple(plans),
        selected={task: selected(plan) for task, plan in plans.items()},
        pairs=pairs,
        matrices=tuple(o for o in found if o.first_selected or o.second_selected),
    )


def _in_matrix(own: Mapping[str, Tensor], name: str, operation: str, numel: int) -> list[Overlap]:
    """Every two tasks' overlap among the `numel` entries of one matrix."""
    found = []
    for first, second in combinations(own, 2):
        a, b = own[first].numel(), own[second].numel()
        shared = (
            int(torch.isin(own[first], own[second], assume_unique=True).sum()) if a and b else 0
        )
        found.append(Overlap(first, second, name, operation, a, b, shared, a * b / numel))
    return found


def _whole(matrices: list[Overlap]) -> Overlap:
    """Two tasks' overlap over all matrices."""
    return Overlap(
        matrices[0].first,
        matrices[0].second,
        "",
        "",
        sum(o.first_selected for o in matrices),
        sum(o.second_selected for o in matrices),
        sum(o.shared for o in matrices),
        sum(o.by_chance for o in matrices),
    )


def _positions(task: str, plan: Plan) -> dict[tuple[str, int], Tensor]:
    """Selected positions by parameter and row block; `ValueError` where the plan lacks them."""
    found = {}
    for name, info in plan.info.items():
        row_numel = _row_numel(info)
        positions = plan.unstructured.get(name, torch.empty(0, dtype=torch.int64))
        counts = plan.selected.get(name, (0,) * len(info.row_blocks))
        for place, (block, count) in enumerate(zip(info.row_blocks, counts, strict=True)):
            ends = torch.tensor([block.start * row_numel, block.stop * row_numel])
            first, last = torch.searchsorted(positions, ends).tolist()
            if last - first != count:
                raise ValueError(
                    f"tasks: the plan of {task!r} does not hold the {count:,} positions that it "
                    f"selected in {name} ({block.operation}), as a LoRA, an Adapter or the whole "
                    "stands for them: give its sensitivity, or a plan with structured none"
                )
            found[name, place] = positions[first:last]
    return found


def _row_numel(info: ParameterInfo) -> int:
    return info.numel // max(1, info.row_blocks[-1].stop)
