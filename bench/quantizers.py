"""Quantizers of a model's Linears outside of its head, those that are installed, by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _int8(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=_is_body)
    return model


def _int4(model: nn.Module) -> nn.Module:
    """In groups of 32, one to a byte: torchao's packed layouts of 4 bits need a card."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantize_(model, config, filter_fn=_is_body)
    return model


def _nf4(model: nn.Module) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    for name, module in list(model.named_modules()):
        if _is_body(module, name):
            layer = _as_4_bits(module, Linear4bit)
            parent, _, local = name.rpartition(".")
            setattr(model.get_submodule(parent), local, layer)
    return model.to("cpu")


def _as_4_bits(linear: Any, kind: Any) -> nn.Module:
    dtype, bias = linear.weight.dtype, linear.bias is not None
    sizes = linear.in_features, linear.out_features
    layer: nn.Module = kind(*sizes, bias, compute_dtype=dtype, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    return layer.to(dtype) if dtype != torch.float32 else layer


def _is_body(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and not name.endswith("head")


_EACH: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "int8": ("torchao", _int8),
    "int4": ("torchao", _int4),
    "nf4": ("bitsandbytes", _nf4),
}
QUANTIZERS = {
    name: quantize
    for name, (package, quantize) in _EACH.items()
    if importlib.util.find_spec(package)
}
