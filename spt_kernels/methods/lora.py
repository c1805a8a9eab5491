"""LoRA of one rank on the query and value of every attention (Hu et al., 2021).

A model without attention has it where `lora_matrices` says: on every linear layer and every 1×1
convolution of its blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..model import ParameterInfo, backbone_numel, describe, possible_names
from ..plan import LoraSpec, Plan
from .matrices import lora_matrices
from .method import DEFAULT_RANK, Method
from .tunable import plan_of

_Rows = Mapping[str, tuple[tuple[int, int], ...]]


def plan(model: nn.Module, method: Method, sensitivity: Any) -> Plan:
    """The rank that was asked for, or the largest that the budget has for every matrix.

    Raises:
        ValueError: the budget is too small, or there is no matrix to put a LoRA on.
    """
    info = describe(model)
    budget = method.count(backbone_numel(model, method.head))
    rank = method.rank
    if rank is None and method.budget is None:
        rank = DEFAULT_RANK
    if rank is None:
        rank = max(1, budget // _cost(info, _rows(model, info, method, 1)))
    rows = _rows(model, info, method, rank)
    cost = rank * _cost(info, rows)
    if method.budget is not None and cost > budget:
        raise ValueError(f"budget: LoRA of rank {rank} costs {cost:,}, got {budget:,}")
    structured = {
        name: LoraSpec(rank, ranges, info[name].shape[1], method.scale, method.dropout)
        for name, ranges in rows.items()
    }
    return plan_of(model, structured=structured, head=method.head)


def _rows(model: nn.Module, info: Mapping[str, ParameterInfo], method: Method, rank: int) -> _Rows:
    """Rows of q and v of each matrix that has such, or all of those that `lora_matrices` chose."""
    of_attention = {
        name: tuple((b.start, b.stop) for b in info[name].row_blocks if b.operation in ("q", "v"))
        for name in possible_names(model, head=method.head)
        if info[name].kind == "linear"
    }
    found = {name: ranges for name, ranges in of_attention.items() if ranges}
    if found:
        return found
    chosen = lora_matrices(model, method.head, rank)
    return {f"{name}.weight": ((0, what.shape[0]),) for name, what in chosen.items()}


def _cost(info: Mapping[str, ParameterInfo], rows: _Rows) -> int:
    """Of rank 1."""
    return sum(
        LoraSpec.cost(1, info[name].shape[1], stop - start)
        for name, ranges in rows.items()
        for start, stop in ranges
    )
