"""PEFT's SHiRA on every matrix of the blocks: entries drawn at random, a dense gradient."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .method import Method
from .peft_model import peft, tune_all_by
from .tunable import Tunable


def tune(model: nn.Module, method: Method, plan: Any) -> Tunable:
    """A matrix trains rank × (rows + columns) entries, as many as a LoRA of that rank."""
    return tune_all_by(model, method, functools.partial(peft().ShiraConfig, random_seed=0))


def let_fakes_run(model: nn.Module) -> None:
    """Give SHiRA's layers, for good, a forward in operations that fake tensors can do.

    PEFT adds a sparse tensor to a copy of the weight, of which fake tensors know no gradient.
    Adding the values at their positions makes and keeps tensors of the same sizes.
    """
    for module in model.modules():
        if hasattr(module, "shira_weight"):
            module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]


def _forward(layer: Any, x: Tensor) -> Tensor:
    weight = layer.base_layer.weight.clone()
    values = layer.shira_weight["default"] * layer.scaling["default"]
    rows, columns = layer.shira_indices["default"]
    weight.index_put_((rows, columns), values.to(weight.dtype), accumulate=True)
    bias = layer.base_layer.bias
    return F.linear(x, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))
