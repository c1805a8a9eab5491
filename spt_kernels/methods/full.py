"""Full fine-tuning: every parameter is trained, and the whole model is the result."""

from __future__ import annotations

from typing import Any

from torch import nn

from .method import Method
from .tunable import Tunable, as_it_is, counted


def tune(model: nn.Module, method: Method, plan: Any) -> Tunable:
    """Let every floating parameter require a gradient."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return counted(model, as_it_is, "model", head=method.head)
