"""PEFT's LoRA: of rank K where `lora-K` has it, or on every matrix of the blocks."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from .matrices import check_rank, lora_matrices
from .method import Method
from .peft_model import peft, tune_all_by, tune_by
from .tunable import Tunable


def tune(model: nn.Module, method: Method, plan: Any) -> Tunable:
    """With PEFT's defaults but for the rank: on every matrix the highest that the budget allows."""
    config = peft().LoraConfig
    if method.name == "peft-lora-all":
        return tune_all_by(model, method, config)
    targets = lora_matrices(model, method.head, method.size)
    check_rank("method", method.size, (what.shape[:2] for what in targets.values()))
    return tune_by(model, method, functools.partial(config, r=method.size), targets)
