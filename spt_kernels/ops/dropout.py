"""Dropout whose mask is a function of a seed: a backward draws it again instead of keeping it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..reference import dropout as reference

_UINT32 = 0xFFFFFFFF

torch.library.define(
    "spt::dropout", "(Tensor input, float probability, int seed, int first) -> Tensor"
)
torch.library.define(
    "spt::dropout_", "(Tensor(a!) input, float probability, int seed, int first) -> ()"
)


def dropout(input: Tensor, probability: float, seed: int, first: int = 0) -> Tensor:
    """A copy of `input` with elements set to zero, which ones being settled by seed and position.

    The same on every device, for every dtype, whatever the number of threads. Kept elements are as
    they were: the factor `1 / (1 - probability)` is the caller's, who may apply it to something
    smaller.

    Args:
        input: floating, any strides; its elements count in row-major order.
        probability: of an element to be dropped, within [0, 1].
        seed: non-negative, below 2⁶³; any two give masks that have nothing to do with each other.
        first: position of the first element, where `input` is a part of something; modulo 2³².

    Returns:
        Contiguous, otherwise like `input`.

    Raises:
        TypeError: `input` is not floating.
        ValueError: a number is out of its range.
    """
    _check(input, probability, seed, first)
    return torch.ops.spt.dropout(input, probability, seed, first)


def dropout_(input: Tensor, probability: float, seed: int, first: int = 0) -> Tensor:
    """`dropout` in place, of a contiguous tensor, which is returned."""
    _check(input, probability, seed, first)
    if not input.is_contiguous():
        raise ValueError(f"input must be contiguous, got strides {input.stride()}")
    torch.ops.spt.dropout_(input, probability, seed, first)
    return input


def _check(input: Tensor, probability: float, seed: int, first: int) -> None:
    if not input.is_floating_point():
        raise TypeError(f"input must be floating, got {input.dtype}")
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability must be within [0, 1], got {probability}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be within [0, 2⁶³), got {seed}")
    if first < 0:
        raise ValueError(f"first must not be negative, got {first}")


def _mix(x: int) -> int:
    x = ((x ^ x >> 16) * 0x7FEB352D) & _UINT32
    x = ((x ^ x >> 15) * 0x846CA68B) & _UINT32
    return x ^ x >> 16


def _run(input: Tensor, output: Tensor, probability: float, seed: int, first: int) -> None:
    if probability >= 1.0:
        output.zero_()
        return
    low, high = seed & _UINT32, seed >> 32
    before, between = _mix(low ^ _mix(high ^ 0x9E3779B9)), _mix(high ^ _mix(low ^ 0x85EBCA6B))
    threshold = min(round(probability * 2**32), _UINT32)
    if input.device.type == "cuda":
        from ..kernels import dropout as kernels

        with torch.cuda.device_of(input):  # Triton launches on the current device
            kernels.dropout(input, output, before, between, threshold, first)
    else:
        on_cpu = input.device.type == "cpu" and native.available()
        backend = native if on_cpu else reference
        backend.dropout(input, output, before, between, threshold, first)


def _out_of_place(input: Tensor, probability: float, seed: int, first: int) -> Tensor:
    input = input.contiguous()
    output = torch.empty_like(input)
    _run(input, output, probability, seed, first)
    return output


def _in_place(input: Tensor, probability: float, seed: int, first: int) -> None:
    _run(input, input, probability, seed, first)
    if not input.is_inference():
        torch.autograd.graph.increment_version(input)  # raw pointers were written through


for _device in ("cpu", "cuda"):
    torch.library.register_kernel("spt::dropout", _device, _out_of_place)
    torch.library.register_kernel("spt::dropout_", _device, _in_place)


@torch.library.register_fake("spt::dropout")
def _fake(input: Tensor, probability: float, seed: int, first: int) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


torch.library.register_fake("spt::dropout_", lambda *arguments: None)
