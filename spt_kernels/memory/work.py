"""`Work`: what a training step computes and moves, counted in its rehearsal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from ..gradient_ways.gradient_cost import RATES
from ..gradient_ways.gradient_cost import Work as GradientWork
from .call_mode import CallMode

_aten: Any = torch.ops.aten
# Of these a kernel neither reads nor writes anything, though their schema does not say so
_FREE = {
    _aten._unsafe_view.default,
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
    _aten._local_scalar_dense.default,
}
# What a flop of a product over all tokens takes of what one of a step's other products takes: an
# H100 gave the gradient of 3072×768 (12,608 tokens) in 93 µs of bf16 and 1,182 of fp32
_OF_OTHERS_NARROW, _OF_OTHERS_FP32 = 0.62, 0.85
# What the flops of a product in place are counted by
_IN_PLACE = {_aten.addmm_: _aten.addmm, _aten.baddbmm_: _aten.baddbmm}
# Ops that multiply all tokens by a factor, and where it is among their arguments
_FACTOR_AT = {"low_rank_down": 1, "low_rank_up": 2, "low_rank_up_": 2}
# Ops whose second kernel reads what the first has made: entries of a product, partial sums
_OF_TWO_KERNELS = {"sparse_weight_grad", "sparse_norm_grad", "low_rank_grad"}
# What a card moves at the least of memory: one channel of a token
_SECTOR_BYTES = 32
# Weights that a delta is written into: of most of their elements nothing is touched
_SPARSELY_WRITTEN = "targets"


@dataclass(frozen=True)
class Call:
    """What one kernel does, or a few of one operator.

    Attributes:
        flops: of its products; 0 where it has none.
        dtype: of their factors; None where it has none.
        moved_bytes: that it reads and writes.
    """

    flops: int
    dtype: torch.dtype | None
    moved_bytes: int


@dataclass(frozen=True)
class Work:
    """All calls of a step.

    Attributes:
        calls: each kind of call -> how often it was made.
    """

    calls: Mapping[Call, int] = field(default_factory=dict)

    def __sub__(self, other: Work) -> Work:
        """What was done since `other`, which is a part of it."""
        counts = {call: times - other.calls.get(call, 0) for call, times in self.calls.items()}
        return Work({call: times for call, times in counts.items() if times})

    @property
    def flops(self) -> int:
        """Of all products."""
        return sum(call.flops * times for call, times in self.calls.items())

    @property
    def moved_bytes(self) -> int:
        """By all calls."""
        return sum(call.moved_bytes * times for call, times in self.calls.items())

    @property
    def launches(self) -> int:
        """How many calls there are."""
        return sum(self.calls.values())


class WorkCounter(CallMode):
    """Counts while it is active; `work()` is what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: Counter[Call] = Counter()

    def work(self) -> Work:
        """So far."""
        return Work(dict(self._calls))

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the call, and count what it computes and moves."""
        result = func(*args, **kwargs)
        if func.is_view or func in _FREE or func.namespace == "prim":
            return result
        if func is torch.ops.spt.sparse_norm_grad.default:
            moved = _moved_for_channels(*args)
        else:
            touched = _touched(func, args, kwargs, result)
            moved = sum(t.nbytes for t in tree_iter(touched) if isinstance(t, Tensor))
        flops, dtype = _products(func, args, kwargs, result)
        self._calls[Call(flops, dtype, moved)] += 1
        if func.namespace == "spt" and func._opname in _OF_TWO_KERNELS:
            self._calls[Call(0, None, 2 * sum(t.nbytes for t in tree_iter(result)))] += 1
        return result


def _touched(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """What a call reads and what it writes: twice what it does both to."""
    schema = func._schema
    if schema.returns:  # what is written in place is among the results
        return args, kwargs, result
    given = [
        (value, argument.is_write)
        for argument, value in zip(schema.arguments, args, strict=False)
        if argument.name != _SPARSELY_WRITTEN
    ]
    return given, kwargs, [value for value, is_written in given if is_written]


def _moved_for_channels(gy: Tensor, x: Tensor | None, *others: Tensor | None) -> int:
    """Bytes that are read for some channels of a LayerNorm, of its weight and of its bias."""
    *statistics, of_weight, of_bias = (0 if t is None else t.nbytes for t in others)
    n_weights, n_entries = of_weight // 4, (of_weight + of_bias) // 4
    of_gy = min(gy.nbytes, len(gy) * _SECTOR_BYTES * n_entries)
    of_x = 0 if x is None else min(x.nbytes, len(gy) * _SECTOR_BYTES * n_weights)
    return sum(statistics) + of_gy + of_x


def _products(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> tuple[int, torch.dtype | None]:
    """Flops of a call's products, and the dtype of their factors."""
    if func.namespace == "spt":
        return _own_products(func, args)
    packet = _IN_PLACE.get(func._overloadpacket, func._overloadpacket)
    count = flop_registry.get(packet)
    if count is None:
        return 0, None
    factor = next(t for t in tree_iter(args) if isinstance(t, Tensor))
    if packet in (_aten.addmm, _aten.baddbmm):
        factor = args[1]
    return int(count(*args, **kwargs, out_val=result)), factor.dtype


def _own_products(func: Any, args: tuple[Any, ...]) -> tuple[int, torch.dtype | None]:
    """Those of ops of this package; a sparse gradient as an H100 has it without tiles."""
    name, first = func._opname, args[0]
    if name in _FACTOR_AT:
        return 2 * first.shape[0] * args[_FACTOR_AT[name]].numel(), first.dtype
    if name == "low_rank_grad":
        return 2 * first.numel() * args[1].shape[1], first.dtype
    if name != "sparse_weight_grad":
        return 0, None
    x, index = args[1:3]  # [tokens, in], [nnz]; the first is [tokens, out]
    is_fp32 = x.dtype == torch.float32
    rates = RATES[90].fp32 if is_fp32 else RATES[90].narrow
    ways = GradientWork(index.numel(), first.shape[1] * x.shape[1]).costs(rates)
    share = _OF_OTHERS_FP32 if is_fp32 else _OF_OTHERS_NARROW
    return int(2 * first.shape[0] * min(ways.values()) * share), x.dtype
