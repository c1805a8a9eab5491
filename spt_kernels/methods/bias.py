"""Every bias of the backbone, those of norms among them (BitFit, Zaken et al., 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..model import candidate_names, describe
from ..plan import Plan
from .method import Method
from .tunable import plan_of


def plan(model: nn.Module, method: Method, sensitivity: Any) -> Plan:
    """All entries of every bias.

    Raises:
        ValueError: the model has none.
    """
    info = describe(model)
    entries = {
        name: torch.arange(info[name].numel)
        for name in candidate_names(model, head=method.head)
        if info[name].kind in ("bias", "norm") and name.endswith("bias")
    }
    if not entries:
        raise ValueError(f"method: {type(model).__name__} has no biases to train")
    return plan_of(model, entries, head=method.head)
