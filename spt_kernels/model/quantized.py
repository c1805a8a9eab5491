"""The quantized weight of a Linear: its shape, its parts, its product, and its values as floats.

No quantizer is imported: torchao's weights are subclasses of a tensor that flatten into plain ones,
and bitsandbytes' of 4 bits carry a `quant_state`. Only what quantizes the weight alone is served: a
layer that rounds its input as well is not linear in a weight that a gradient could be taken of.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .plain_layer import runs_as_linear

_QUANTIZERS = ("torchao", "bitsandbytes")


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """The quantized weight of a Linear, `[out, in]`; read, and never written.

    Attributes:
        weight: the parameter itself.
        compute_dtype: what a layer of bitsandbytes casts its input to, None where it does not.
    """

    weight: Any
    compute_dtype: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`(out, in)`, however the values are packed."""
        return logical_shape(self.weight)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values that it stands for."""
        state = state_of(self.weight)
        dtype: torch.dtype = self.weight.dtype if state is None else state.dtype
        return dtype

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`[..., out]` in the dtype of `x`, by the quantizer's own kernels.

        A compute dtype does not count under autocast, as within the plain layer it does not.
        """
        state = state_of(self.weight)
        if state is None:
            return F.linear(x, self.weight, bias)
        # not by the forward of the layer, which may repack the weight and cast the bias for good
        is_set = self.compute_dtype is not None and not torch.is_autocast_enabled(x.device.type)
        dtype: Any = self.compute_dtype if is_set else x.dtype
        bias = None if bias is None else bias.to(dtype)
        y = _package_of(state).matmul_4bit(x.to(dtype), self.weight, bias=bias, quant_state=state)
        return y.to(x.dtype)  # type: ignore[no-any-return]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The values, `[out, in]` in memory of their own."""
        weight, state = self.weight.detach(), state_of(self.weight)
        if state is not None:
            values = _package_of(state).functional.dequantize_4bit(weight, state)
        elif _dequantizes(type(weight)):
            values = weight.dequantize()
        else:  # as those that kernels for a card alone know how to read
            unit = torch.eye(self.shape[1], dtype=weight.dtype, device=weight.device)
            values = F.linear(unit, weight).t()
        return values.to(dtype).contiguous()  # type: ignore[no-any-return]


def matrix_of(module: nn.Module) -> QuantizedMatrix | None:
    """The weight of a plain module, if that is a Linear and its weight is quantized."""
    weight: Any = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    if weight is None or not is_quantized(weight):
        return None
    is_packed = state_of(weight) is not None
    return matrix_in(module) if is_packed or runs_as_linear(module) else None


def matrix_in(module: nn.Module) -> QuantizedMatrix:
    """The same of a module that is known for one, as a tuned one is."""
    weight: Any = module._parameters["weight"]
    dtype = getattr(module, "compute_dtype", None) if state_of(weight) is not None else None
    return QuantizedMatrix(weight, dtype)


def quantized_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, QuantizedMatrix]]:
    """Name of every Linear with a quantized weight, the module, and the weight."""
    for name, module in model.named_modules():
        matrix = matrix_of(module)
        if matrix is not None:
            yield name, module, matrix


def quantized_names(model: nn.Module) -> dict[str, str]:
    """Name of every quantized parameter, in whatever kind of module -> what it is quantized to."""
    return {n: quantization(p) for n, p in model.named_parameters() if is_quantized(p)}


def floating_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> every parameter that may require a gradient."""
    named = model.named_parameters()
    return {n: p for n, p in named if p.is_floating_point() and not is_quantized(p)}


def is_quantized(tensor: Tensor) -> bool:
    """Whether a parameter holds quantized values, in whatever kind of module."""
    kind = type(tensor)
    if kind is Tensor or kind is nn.Parameter:
        return False
    return is_of_a_quantizer(kind) or state_of(tensor) is not None or _dequantizes(kind)


def quantization(tensor: Tensor) -> str:
    """What a parameter is quantized to: `Int8Tensor`, `nf4`; empty where it is not."""
    if not is_quantized(tensor):
        return ""
    state = state_of(tensor)
    return type(tensor).__name__ if state is None else str(state.quant_type)


def logical_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, or of the matrix that is packed in it."""
    state = state_of(tensor)
    return tuple(tensor.shape if state is None else state.shape)


def logical_numel(tensor: Tensor) -> int:
    """How many numbers a parameter stands for."""
    return torch.Size(logical_shape(tensor)).numel()


def inner_tensors(tensor: Tensor) -> dict[str, Tensor]:
    """The plain tensors that a quantized parameter is made of, by name: values, scales, ..."""
    state = state_of(tensor)
    if state is None:
        if not hasattr(tensor, "__tensor_flatten__"):
            return {"data": tensor.detach()}
        names, _ = tensor.__tensor_flatten__()  # type: ignore[operator]
        return {name: getattr(tensor, name) for name in names}
    data = tensor.detach()
    if is_of_a_quantizer(type(data)):
        data = data.as_subclass(Tensor)
    return {"data": data, **dict(_tensors_of_state(state))}


@torch.no_grad()
def make_float(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Give every Linear of a plain model that is quantized the values of its weight as floats."""
    places = list(quantized_matrices(model))
    floats: dict[int, nn.Parameter] = {}  # by weight, of which several layers may have one
    for _, _, matrix in places:
        if id(matrix.weight) not in floats:
            values = matrix.dense(dtype or matrix.dtype)
            floats[id(matrix.weight)] = nn.Parameter(values, matrix.weight.requires_grad)
    for _, module, matrix in places:
        if not runs_as_linear(module):
            module.__class__ = nn.Linear
        module._parameters["weight"] = floats[id(matrix.weight)]
    for module in model.modules():
        # of transformers, which would write into a saved model that it is quantized
        quantizer: Any = vars(module).get("hf_quantizer")
        if quantizer is not None and not quantized_names(module):
            quantizer.remove_quantization_config(module)


def state_of(tensor: Any) -> Any:
    """What bitsandbytes keeps beside a weight of 4 bits; None for anything else."""
    state = getattr(tensor, "quant_state", None)
    return state if hasattr(state, "quant_type") else None


def is_of_a_quantizer(kind: type[Any]) -> bool:
    """Whether a class, of tensors or of layers, is one of torchao's or bitsandbytes'."""
    return kind.__module__.partition(".")[0] in _QUANTIZERS


def _dequantizes(kind: type[Any]) -> bool:
    """Whether a class of tensors is of plain ones inside, and knows how to be a float again."""
    # not `hasattr`, which torch 2.11 cannot trace
    if getattr(kind, "__tensor_flatten__", None) is None:
        return False
    return kind.dequantize is not Tensor.dequantize  # type: ignore[comparison-overlap]


def _package_of(state: Any) -> Any:
    return sys.modules[type(state).__module__.partition(".")[0]]


def _tensors_of_state(state: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in sorted(vars(state).items()):
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif hasattr(value, "quant_type"):  # of a state that is quantized itself
            yield from _tensors_of_state(value, f"{prefix}{name}.")
