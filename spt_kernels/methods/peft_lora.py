"""PEFT's LoRA of rank K on attention's fused q, k, v."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from .matrices import attention_matrices
from .method import Method
from .peft_model import peft, tune_by
from .tunable import Tunable


def tune(model: nn.Module, method: Method, plan: Any) -> Tunable:
    """With PEFT's defaults but for the rank."""
    config = functools.partial(peft().LoraConfig, r=method.size)
    return tune_by(model, config, attention_matrices(model))
