"""A copy of a model on fake tensors, and all the tensors that the model holds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_iter

from ..layers import sparse_deltas
from ..layers.autograd.sparse_gradient import DeltaPattern
from ..model.deep_copy import deep_copy
from ..model.quantized import inner_tensors, is_quantized
from ..ops.sparse_weight_grad import SparsePattern

_CPU = torch.device("cpu")
_WITHOUT_TENSORS = (type(None), bool, int, float, str)  # what most attributes are


def fake_copy(
    model: nn.Module, fakes: FakeTensorMode, dtype: torch.dtype | None = None
) -> tuple[Any, list[Tensor]]:
    """A deep copy with fakes of the same shape for parameters and buffers: no data is read.

    Args:
        model: plain or tuned; its parameters may be fakes already.
        fakes: the mode to make them in.
        dtype: to cast floating tensors to, but for what tuned layers keep in fp32.

    Returns:
        The copy, and fakes for tensors that its modules hold besides, which stay real in it because
        a forward may look at their values.

    Raises:
        ValueError: the model is tuned and on the meta device, or cannot be copied.
    """
    tuning = getattr(model, "spt_tuning", None)
    tensors = {id(t): t for t in _held_by(model)}
    kept = set()
    if tuning is not None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        kept = {id(p) for name, p in trained.items() if name not in tuning.plan.head}
    memo: dict[int, Any] = {}
    for key, tensor in tensors.items():
        if is_quantized(tensor):
            memo[key] = _quantized_fake(tensor, fakes, dtype)
            continue
        is_real = not isinstance(tensor, FakeTensor)
        is_cast = is_real and tensor.is_floating_point() and key not in kept
        fake: Any = _empty_like(tensor, fakes, dtype if is_cast else None)
        if isinstance(tensor, nn.Parameter):
            fake._is_param = True  # as `nn.Parameter` does, but that it detaches: a call on fakes
            fake.requires_grad_(tensor.requires_grad)
        memo[key] = fake

    real: dict[int, Tensor] = {}
    if tuning is not None:
        memo[id(tuning)] = tuning
        real |= {id(t): t for t in tuning.base_head.values()}
        real |= {id(t): t for t in tuning.base_buffers.values() if t is not None}
    for module in model.modules():
        for value in vars(module).values():
            if type(value) in _WITHOUT_TENSORS or value is tuning:
                continue  # the plan is no part of the model
            if isinstance(value, DeltaPattern):
                twin = DeltaPattern(_on_cpu(value.whole))
                memo[id(value)] = twin
                # made on first use otherwise, from the values of the index
                real |= {id(t): t for t in _tensors_within(twin.compacted)}
            real |= {id(t): t for t in _tensors_within(value)}
    besides = []
    for key, t in real.items():
        if not t.is_leaf:  # which no copy can have: made by a forward, and made again by the next
            memo.setdefault(key, t.detach().to(_CPU, copy=True))
        elif key not in tensors:
            besides.append(_empty_like(t, fakes, dtype if t.is_floating_point() else None))
            if t.is_meta:
                memo[key] = besides[-1]
            elif not t.is_cpu:  # the step runs on the CPU wherever the model is
                memo.setdefault(key, t.to(_CPU))
    return deep_copy(model, memo, "an account of its memory"), besides


def _on_cpu(pattern: SparsePattern) -> SparsePattern:
    if pattern.index.is_cpu:
        return pattern
    if pattern.index.is_meta:
        raise ValueError(
            "the model is tuned and on the meta device, which holds no positions: account for it "
            "before it goes there"
        )
    return SparsePattern.build(pattern.index.cpu(), pattern.out_features, pattern.in_features)


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and what sparse deltas hold besides: positions and base values.

    Of a quantized parameter, the tensors that it is made of.
    """
    for tensor in _held_by(model):
        yield from inner_tensors(tensor).values() if is_quantized(tensor) else (tensor,)


def _held_by(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for delta in sparse_deltas(model).values():
        yield from (delta.index, delta.original)


def _quantized_fake(tensor: Any, fakes: FakeTensorMode, dtype: torch.dtype | None) -> Tensor:
    """A quantized parameter of fakes in the place of its inner tensors, `dtype` as `fake_copy`."""
    inner = {
        id(t): t.detach() if isinstance(t, FakeTensor) else _empty_like(t, fakes)
        for t in inner_tensors(tensor).values()
    }
    if hasattr(tensor, "quant_state"):  # of bitsandbytes, whose classes cannot hold a fake
        data = tensor.detach()
        packed = data if isinstance(data, FakeTensor) else _empty_like(data, fakes)
        made: Any = nn.Parameter(packed, requires_grad=False)
        made.quant_state = copy.deepcopy(tensor.quant_state, inner)
        return made  # type: ignore[no-any-return]
    names, how = tensor.__tensor_flatten__()
    parts = {name: inner[id(getattr(tensor, name))] for name in names}
    with fakes:
        made = type(tensor).__tensor_unflatten__(parts, how, tensor.shape, tensor.stride())
        made = made if dtype is None or not made.is_floating_point() else made.to(dtype)
    return nn.Parameter(made, requires_grad=tensor.requires_grad)


def _tensors_within(value: Any) -> Iterator[Tensor]:
    """Tensors in an attribute of a module: in containers, and in dataclasses as patterns are."""
    for leaf in tree_iter(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            for field in fields(leaf):
                yield from _tensors_within(getattr(leaf, field.name))


def _empty_like(tensor: Tensor, fakes: FakeTensorMode, dtype: torch.dtype | None = None) -> Tensor:
    # what the mode makes of `torch.empty_strided` on a CPU, without asking it for each
    dtype = dtype or tensor.dtype
    with no_dispatch():  # nor any other mode
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="meta")
        return FakeTensor(fakes, meta, _CPU)
