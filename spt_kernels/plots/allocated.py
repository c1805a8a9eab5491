"""What a plan does with each operation of each block of one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..plan import Cell, Plan
from ..plan.table import KINDS, ordered
from .numbers import Numbers
from .selection import selection


@dataclass(frozen=True)
class Allocation(Numbers):
    """A plan by block and operation: the paper's Figures 1b and 2.

    Attributes:
        blocks: names of the blocks, `""` for what lies in none, in the model's order.
        operations: names of the operations.
        cells: (block, operation) -> its numbers of parameters; only what the model has.
        module: `LoRA`, `Adapter`, or `None` where no matrix has one.
        trained: parameters that the plan trains, without the head.
        backbone: parameters of the model without its head; 0 if unknown.
    """

    blocks: tuple[str, ...]
    operations: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    module: str | None
    trained: int
    backbone: int

    def rows(self) -> list[dict[str, Any]]:
        """A row per cell."""
        return [
            {
                "block": block,
                "operation": operation,
                "parameters": cell.numel,
                "selected": cell.selected,
                "entries": cell.unstructured,
                "module": self.module if cell.structured else None,
                "module_parameters": cell.structured,
            }
            for (block, operation), cell in self.cells.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        own = {name: getattr(self, name) for name in ("module", "trained", "backbone")}
        return {**own, "cells": self.rows()}


def allocation(plan: Plan) -> Allocation:
    """What `plan` does with each cell; `ValueError` if no sensitivity made it."""
    cells = selection(plan).cells()
    module = KINDS[plan.kind] if plan.kind and plan.structured else None
    return Allocation(
        blocks=tuple(dict.fromkeys(block for block, _ in cells)),
        operations=tuple(ordered(operation for _, operation in cells)),
        cells=cells,
        module=module,
        trained=plan.num_trainable,
        backbone=plan.backbone_numel,
    )
