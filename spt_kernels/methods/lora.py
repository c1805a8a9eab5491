"""LoRA of one rank on the query and value of every attention (Hu et al., 2021).

A model without attention gets it on every linear matrix of its blocks.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..model import ParameterInfo, backbone_numel, describe, possible_names
from ..plan import LoraSpec, Plan
from .method import DEFAULT_RANK, Method
from .tunable import plan_of


def plan(model: nn.Module, method: Method, sensitivity: Any) -> Plan:
    """The rank that was asked for, or the largest one that fits the budget.

    Raises:
        ValueError: the budget is too small, or there is no matrix to put a LoRA on.
    """
    info = describe(model)
    rows = _rows({name: info[name] for name in possible_names(model, head=method.head)})
    cost = sum(
        LoraSpec.cost(1, info[name].shape[1], stop - start)
        for name, ranges in rows.items()
        for start, stop in ranges
    )
    budget = method.count(backbone_numel(model, method.head))
    rank = method.rank
    if rank is None and method.budget is None:
        rank = DEFAULT_RANK
    if rank is None:
        rank = budget // cost
        if rank < 1:
            raise ValueError(f"budget: LoRA of rank 1 on q and v costs {cost:,}, got {budget:,}")
    elif method.budget is not None and rank * cost > budget:
        raise ValueError(f"budget: LoRA of rank {rank} costs {rank * cost:,}, got {budget:,}")
    structured = {
        name: LoraSpec(rank, ranges, info[name].shape[1], method.scale, method.dropout)
        for name, ranges in rows.items()
    }
    return plan_of(model, structured=structured, head=method.head)


def _rows(info: dict[str, ParameterInfo]) -> dict[str, tuple[tuple[int, int], ...]]:
    linear = {name: what for name, what in info.items() if what.kind == "linear"}
    rows = {
        name: tuple((b.start, b.stop) for b in what.row_blocks if b.operation in ("q", "v"))
        for name, what in linear.items()
    }
    if not any(rows.values()):
        rows = {name: ((0, what.shape[0]),) for name, what in linear.items() if what.block}
    rows = {name: ranges for name, ranges in rows.items() if ranges}
    if not rows:
        raise ValueError("method: the model has no linear matrices to put LoRA on")
    return rows
