"""Sensitivity-aware tuning, SPT (He et al., ICCV 2023), with or without its structured half."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..model import head_names
from ..plan import Plan, allocate
from ..plan.table import KINDS
from ..sensitivity import Sensitivity
from .method import DEFAULT_RANK, Method


def plan(model: nn.Module, method: Method, sensitivity: Sensitivity) -> Plan:
    """Spend the budget by the scores; `-structured` leaves out what no module took the place of.

    Raises:
        ValueError: as `allocate`, or `-structured` has no module left, or the method's head is not
            that of the sensitivity.
    """
    check_head(model, method, sensitivity)
    made = allocate(
        sensitivity,
        method.budget_or_default,
        structured=method.entry.structured,
        rank=method.rank or DEFAULT_RANK,
        rule=method.rule,
        scale=method.scale,
        dropout=method.dropout,
        from_block=method.from_block,
    )
    if not method.name.endswith("-structured"):
        return made
    if not made.structured:
        module = KINDS[made.kind or "lora"]
        raise ValueError(
            f"budget: {made.budget:,} puts no {module} on any matrix, nothing would train: "
            "a larger budget or a smaller rank puts some"
        )
    return replace(made, unstructured={})


def check_head(model: nn.Module, method: Method, sensitivity: Sensitivity) -> None:
    """Refuse a head that is not that of the sensitivity."""
    if method.head is not None and head_names(model, method.head) != sensitivity.head:
        raise ValueError(
            f"head: {method.head!r} is not the head that the sensitivity was measured with, which "
            f"is {', '.join(sensitivity.head) or 'none'}: leave it out, or measure again with it"
        )
