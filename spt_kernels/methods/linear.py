"""Linear probing: the head is trained and nothing else."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..plan import Plan
from .method import Method
from .tunable import plan_of


def plan(model: nn.Module, method: Method, sensitivity: Any) -> Plan:
    """Nothing but the head, which every plan trains."""
    return plan_of(model, head=method.head)
