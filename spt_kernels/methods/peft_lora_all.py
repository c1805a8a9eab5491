"""PEFT's LoRA on every matrix of the blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from .method import Method
from .peft_model import peft, tune_all_by
from .tunable import Tunable


def tune(model: nn.Module, method: Method, plan: Any) -> Tunable:
    """Of the highest rank that the budget allows."""
    return tune_all_by(model, method, peft().LoraConfig)
