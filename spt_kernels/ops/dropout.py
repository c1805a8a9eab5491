"""Dropout whose mask is a function of a seed: a backward draws it again instead of keeping it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..reference import dropout as reference
from .launching import check_unrecorded, mark_mutated, may_launch, on_card, register

_UINT32 = 0xFFFFFFFF

# A `key` is given in place of the seed, which is then 0.
torch.library.define(
    "spt::dropout",
    "(Tensor input, float probability, int seed, int first, Tensor? key=None) -> Tensor",
)
torch.library.define(
    "spt::dropout_",
    "(Tensor(a!) input, float probability, int seed, int first, Tensor? key=None) -> ()",
)


def dropout(input: Tensor, probability: float, seed: int | Tensor, first: int = 0) -> Tensor:
    """A copy of `input` with elements set to zero, which ones being settled by seed and position.

    The same on every device, for every dtype, whatever the number of threads. Kept elements are as
    they were: the factor `1 / (1 - probability)` is the caller's, who may apply it to something
    smaller.

    Args:
        input: floating, any strides; its elements count in row-major order.
        probability: of an element to be dropped, within [0, 1].
        seed: non-negative, below 2⁶³; any two give masks that have nothing to do with each other.
            Or its `key_of`, int64 `[2]` on the device of `input`, which is read when the kernel
            runs: a CUDA graph then draws the mask of whatever seed is there.
        first: position of the first element, where `input` is a part of something; modulo 2³².

    Returns:
        Contiguous, otherwise like `input`.

    Raises:
        TypeError: `input` is not floating.
        ValueError: a number is out of its range.
    """
    _check(input, probability, seed, first)
    return torch.ops.spt.dropout(input, probability, *_seed_first_key(seed, first))


def dropout_(input: Tensor, probability: float, seed: int | Tensor, first: int = 0) -> Tensor:
    """`dropout` in place, of a contiguous tensor, which is returned.

    Raises:
        ValueError: likewise; `input` needs a gradient, which would be that of what it was.
    """
    _check(input, probability, seed, first)
    check_unrecorded("input", input)
    if not input.is_contiguous():
        raise ValueError(f"input must be contiguous, got strides {input.stride()}")
    torch.ops.spt.dropout_(input, probability, *_seed_first_key(seed, first))
    return input


def launch_dropout(input: Tensor, probability: float, seed: int | Tensor, first: int = 0) -> Tensor:
    """`dropout` without its checks, past the dispatcher where nobody listens."""
    arguments = input, probability, *_seed_first_key(seed, first)
    if may_launch(input):
        return _out_of_place(*arguments)
    return torch.ops.spt.dropout(*arguments)  # type: ignore[no-any-return]


def launch_dropout_(
    input: Tensor, probability: float, seed: int | Tensor, first: int = 0
) -> Tensor:
    """`dropout_` likewise."""
    arguments = input, probability, *_seed_first_key(seed, first)
    if may_launch(input):
        _in_place(*arguments)
    else:
        torch.ops.spt.dropout_(*arguments)
    return input


def key_of(seed: Any) -> tuple[Any, Any]:
    """The two words of a seed that go into the hash: ints of an int, int64 tensors of an int64."""
    low, high = seed & _UINT32, seed >> 32
    return _mix(low ^ _mix(high ^ 0x9E3779B9)), _mix(high ^ _mix(low ^ 0x85EBCA6B))


def threshold_of(probability: float) -> int:
    """Below which the 32 bits of an element's hash drop it."""
    return min(round(probability * 2**32), _UINT32)


# For eager code: no compiler traces them, and forward and backward ask the same
known_key_of = functools.lru_cache(1024)(key_of)
known_threshold_of = functools.lru_cache(64)(threshold_of)


def _seed_first_key(seed: int | Tensor, first: int) -> tuple[int, int, Tensor | None]:
    return (0, first, seed) if isinstance(seed, Tensor) else (seed, first, None)


def _check(input: Tensor, probability: float, seed: int | Tensor, first: int) -> None:
    if not input.is_floating_point():
        raise TypeError(f"input must be floating, got {input.dtype}")
    check_mask(probability, seed, input.device)
    if first < 0:
        raise ValueError(f"first must not be negative, got {first}")


def check_mask(probability: float, seed: int | Tensor, device: torch.device) -> None:
    """Refuse what is no probability and no seed of a mask on this device.

    Raises:
        ValueError: one of them is none.
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability must be within [0, 1], got {probability}")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape != (2,) or seed.device != device:
            raise ValueError(
                f"seed must be a number or int64 [2] on {device}, got {seed.dtype} "
                f"{list(seed.shape)} on {seed.device}"
            )
    elif not 0 <= seed < 2**63:
        raise ValueError(f"seed must be within [0, 2⁶³), got {seed}")


def _mix(x: Any) -> Any:
    x = ((x ^ x >> 16) * 0x7FEB352D) & _UINT32
    x = ((x ^ x >> 15) * 0x846CA68B) & _UINT32
    return x ^ x >> 16


def _run(
    input: Tensor, output: Tensor, probability: float, seed: int, first: int, key: Tensor | None
) -> None:
    if probability >= 1.0:
        output.zero_()
        return
    threshold = known_threshold_of(probability)
    if input.device.type == "cuda":
        from ..kernels import dropout as kernels

        before, between = (0, 0) if key is not None else known_key_of(seed)
        with on_card(input.device):
            kernels.dropout(input, output, before, between, threshold, first, key)
    else:
        before, between = known_key_of(seed) if key is None else key.tolist()
        on_cpu = input.device.type == "cpu" and native.available()
        backend = native if on_cpu else reference
        backend.dropout(input, output, before, between, threshold, first)


def _out_of_place(
    input: Tensor, probability: float, seed: int, first: int, key: Tensor | None = None
) -> Tensor:
    input = input.contiguous()
    output = torch.empty_like(input)
    _run(input, output, probability, seed, first, key)
    return output


def _in_place(
    input: Tensor, probability: float, seed: int, first: int, key: Tensor | None = None
) -> None:
    _run(input, input, probability, seed, first, key)
    mark_mutated((input,))


for _device in ("cpu", "cuda"):
    register("spt::dropout", _device, _out_of_place)
    register("spt::dropout_", _device, _in_place)


@torch.library.register_fake("spt::dropout")
def _fake(
    input: Tensor, probability: float, seed: int, first: int, key: Tensor | None = None
) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


torch.library.register_fake("spt::dropout_", lambda *arguments: None)
