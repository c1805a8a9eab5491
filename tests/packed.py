"""A quantizer to 4 bits of the tests' own: levels packed two to a byte, and a state beside them.

It is to this package what bitsandbytes is, and needs none: a parameter of bytes with a
`quant_state`, from a package with `matmul_4bit` and `functional.dequantize_4bit`, the first of
them one operator that makes floats of the weight within itself.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE = "spt_tests_packed"


@dataclass(eq=False)
class State:
    """Shape and dtype of what is packed, and what to multiply each row by."""

    shape: torch.Size
    dtype: torch.dtype
    absmax: Tensor
    quant_type: str = "packed"


State.__module__ = PACKAGE


class PackedWeight(nn.Parameter):
    """A parameter with attributes."""

    quant_state: State


def packed(weight: Tensor) -> PackedWeight:
    absmax = weight.detach().abs().amax(1, keepdim=True) / 7
    levels = ((weight.detach() / absmax).round() + 8).to(torch.uint8).flatten()
    made = PackedWeight((levels[::2] << 4 | levels[1::2]).unsqueeze(1), requires_grad=False)
    made.quant_state = State(weight.shape, weight.dtype, absmax)
    return made


def _floats(data: Tensor, shape: Any, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    made = torch.empty(*shape, dtype=dtype)
    # by parts, so that next to nothing is held besides
    for part, pairs in zip(made.chunk(16), data.view(shape[0], -1).chunk(16), strict=True):
        part[:, ::2], part[:, 1::2] = pairs >> 4, pairs & 15
    return made.sub_(8).mul_(absmax.to(dtype))


@torch.library.custom_op(f"{PACKAGE}::dequantize", mutates_args=())
def dequantize(data: Tensor, shape: list[int], absmax: Tensor, dtype: torch.dtype) -> Tensor:
    return _floats(data, shape, absmax, dtype)


@dequantize.register_fake
def _(data: Tensor, shape: list[int], absmax: Tensor, dtype: torch.dtype) -> Tensor:
    return absmax.new_empty(shape, dtype=dtype)


@torch.library.custom_op(f"{PACKAGE}::gemm_4bit", mutates_args=())
def gemm_4bit(
    x: Tensor, data: Tensor, shape: list[int], absmax: Tensor, bias: Tensor | None
) -> Tensor:
    return F.linear(x, _floats(data, shape, absmax, x.dtype), bias)


@gemm_4bit.register_fake
def _(x: Tensor, data: Tensor, shape: list[int], absmax: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


def _matmul(x: Tensor, weight: Tensor, *, bias: Tensor | None, quant_state: State) -> Tensor:
    return gemm_4bit(x, weight, list(quant_state.shape), quant_state.absmax, bias)


def _dequantize(weight: Tensor, state: State) -> Tensor:
    return dequantize(weight, list(state.shape), state.absmax, state.dtype)


@pytest.fixture
def quantizer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Packs the weights of all Linears of a model but its head; the package is there meanwhile."""
    functional = SimpleNamespace(dequantize_4bit=_dequantize)
    package = SimpleNamespace(matmul_4bit=_matmul, functional=functional)
    monkeypatch.setitem(sys.modules, PACKAGE, package)  # type: ignore[arg-type]

    def pack(model: nn.Module) -> nn.Module:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "head" not in name:
                module.weight = packed(module.weight)
        return model

    return pack
