"""Tells a tuned layer whose parameters the model reads itself from one that batches pass by."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .name_in_model import name_in_model, told_as

_NUMBER = re.compile(r"\d+")
_KIND, _READ = "_spt_kind", "_spt_read"  # of a watched class; on a layer that was read


def check_called(without: Iterable[Any], tuned: Iterable[Any]) -> None:
    """Refuse to train on when the model reads what a tuned layer has, and calls the layer never.

    A layer that is not called may be one that this batch has passed by, as layers are dropped at
    random (LayerDrop), or no token is sent to one (a mixture of experts). One of which others in
    other blocks were called is; any other is watched from here on: the next backward that comes to
    its weight tells.

    Args:
        without: tuned layers that were not called so far, and have no gradient after a backward.
        tuned: all tuned layers that the optimizer trains.

    Raises:
        RuntimeError: a backward has come to what a layer has, though the layer was not called.
    """
    called = {_kind_of(layer) for layer in tuned if layer.spt_was_called}
    for layer in without:
        kind = _kind_of(layer)
        if layer.spt_trains_where_read or (kind and kind in called):
            continue
        if getattr(layer, _READ, False):
            raise RuntimeError(_never_called(layer))
        if not hasattr(type(layer), _KIND):
            own_class: Any = type(layer)
            layer.__class__ = _watched(own_class)


@functools.cache
def _watched(kind: Any) -> Any:
    """The class of a layer that notes whether its parameters are read; a call gives `kind` back."""

    def forward(layer: Any, *inputs: Any, **named: Any) -> Any:
        layer._spt_called = True
        if not torch.compiler.is_compiling():
            layer.__class__ = kind
        return kind.forward(layer, *inputs, **named)

    def reduce(layer: Any, protocol: Any) -> tuple[Any, ...]:
        # as a class made at run time cannot be found by its name, copies are of `kind`
        if hasattr(kind, "_spt_made_of"):
            return kind.__reduce_ex__(layer, protocol)  # type: ignore[no-any-return]
        return _empty, (kind,), layer.__getstate__()

    members: dict[str, Any] = {name: _watch(kind, name) for name in ("weight", "bias")}
    members |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, _KIND: kind}
    return type(kind.__name__, (kind,), {**members, "forward": forward, "__reduce_ex__": reduce})


def _empty(kind: type[nn.Module]) -> nn.Module:
    return object.__new__(kind)


def _watch(kind: Any, name: str) -> property:
    own = getattr(kind, name, None)  # of a norm, whose forward reads it so

    def read(layer: Any) -> Any:
        if isinstance(own, property) and own.fget is not None:
            value = own.fget(layer)
        elif name in layer._parameters:
            value = layer._parameters[name]
        else:
            raise AttributeError(name)  # `nn.Module` looks for it elsewhere
        if value is None or not torch.is_grad_enabled() or layer.spt_was_called:
            return value
        if torch.compiler.is_compiling():
            layer._spt_read = True
            return value
        witness = torch.empty(0, device=value.device, requires_grad=True)
        return _Noticed.apply(value, witness, layer)

    return property(read)


class _Noticed(torch.autograd.Function):
    """A parameter as it is; that a backward comes to it is noted."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, witness: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        vars(ctx.layer)[_READ] = True
        return (grad if ctx.needs_input_grad[0] else None), None, None


def _kind_of(layer: nn.Module) -> str:
    """Its name in the model with a mark for each number; empty for a layer that has none."""
    return _NUMBER.sub("#", name_in_model(layer))


def _never_called(layer: nn.Module) -> str:
    return (
        f"{told_as(layer)} is tuned, but the model never calls it (it reads the weight of the "
        "layer itself, as BEiT and Swin V2 do with `qkv`), so that it would never train: "
        "measure_sensitivity notices that and says so in Sensitivity.info, from which allocate and "
        "apply know what to do; in a plan made otherwise, set the kind of its weight to "
        "'functional' or leave it out"
    )
