"""Linear probing: the head is trained and nothing else."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..model import head_names
from ..plan import Plan
from .method import Method
from .tunable import plan_of


def plan(model: nn.Module, method: Method, sensitivity: Any) -> Plan:
    """Nothing but the head, which every plan trains.

    Raises:
        ValueError: the model has none, as far as it is told or names tell.
    """
    if not head_names(model, method.head):
        raise ValueError(
            f"method: {type(model).__name__} has no head to train that its names tell; say which "
            "layer it is with head=..."
        )
    return plan_of(model, head=method.head)
