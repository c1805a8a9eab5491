"""A quantizer of the tests' own: coarse levels and a scale for each row, in a subclass of a tensor.

It is to this package what torchao's weights are, and needs no torchao: a subclass that flattens
into plain tensors, has a product of its own, of which autograd keeps a float copy, and knows its
values as floats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing

aten = torch.ops.aten


class RowScaled(Tensor):
    """Levels of -7 to 7 in int8, and what to multiply those of each row by."""

    levels: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, levels: Tensor, scale: Tensor, dtype: torch.dtype) -> RowScaled:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, levels.shape, dtype=dtype, device=levels.device
        )

    def __init__(self, levels: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.levels, self.scale = levels, scale

    @classmethod
    def of(cls, weight: Tensor) -> RowScaled:
        scale = weight.detach().abs().amax(1, keepdim=True) / 7
        return cls((weight.detach() / scale).round().to(torch.int8), scale, weight.dtype)

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return (self.levels.to(self.scale.dtype) * self.scale).to(self.dtype)

    def __repr__(self) -> str:
        return f"RowScaled({list(self.shape)})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["levels", "scale"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, dtype: Any, size: Any, stride: Any) -> RowScaled:
        return cls(inner["levels"], inner["scale"], dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *rest = args
            bias = rest[0] if rest else (kwargs or {}).get("bias")
            y = (x @ weight.levels.t().to(x.dtype)) * weight.scale.flatten().to(x.dtype)
            return y if bias is None else y + bias
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own, how = args[0], kwargs or {}
        if func is aten._to_copy.default:
            device, dtype = how.get("device"), how.get("dtype") or own.dtype
            return cls(own.levels.to(device), own.scale.to(device), dtype)
        if func is aten.copy_.default:
            own.levels.copy_(args[1].levels)
            own.scale.copy_(args[1].scale)
            return own
        if func in (aten.detach.default, aten.clone.default):
            made = cls(func(own.levels), func(own.scale), own.dtype)
            return return_and_correct_aliasing(func, args, how, made)
        raise NotImplementedError(f"RowScaled has no {func}")


def quantized(linear: nn.Linear) -> nn.Linear:
    """The layer itself, its weight quantized."""
    linear.weight = nn.Parameter(RowScaled.of(linear.weight), requires_grad=False)
    return linear


def quantize(model: nn.Module, but: Callable[[str], bool] = lambda name: "head" in name) -> Any:
    """The model itself, the weights of all its Linears quantized, but for some by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not but(name):
            quantized(module)
    return model


def as_floats(model: nn.Module) -> Any:
    """The model itself, with the values that its quantized weights stand for as its weights."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight.data, RowScaled):
            module.weight = nn.Parameter(module.weight.dequantize())
    return model
