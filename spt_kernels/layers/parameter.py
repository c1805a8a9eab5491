"""Sparse deltas of single parameters that a module reads as attributes: vectors, tokens, tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.sharded import is_sharded
from ..ops.torch_internals import is_transformed, is_wrapped, without_transforms
from .autograd.attach import AttachDelta, AttachWhole
from .deltas.computed import computed
from .deltas.delta_holder import DeltaHolder
from .deltas.position_index import CheckedIndex
from .deltas.sparse_delta import check_trained_whole
from .frozen_layers import FrozenConv2d, FrozenLinear
from .in_place import tune_in_place, untune


def attached(holder: DeltaHolder, local: str) -> Tensor | None:
    """A parameter of a module, connected to its sparse delta where it has one."""
    target, state = holder._parameters.get(local), holder._spt_states.get(local)
    if state is None:
        return target
    delta = holder._parameters.get(state.name)
    if target is None or delta is None:
        target, delta = map(holder._own_parameter, (local, state.name))  # which says what is gone
    if is_transformed():
        return computed(holder, local)  # type: ignore[no-any-return]
    if not torch.is_grad_enabled():
        return target
    if target.requires_grad and state.index_name is not None:
        check_trained_whole((True, delta))
    if not delta.requires_grad:
        return target
    if state.index_name is None:
        return AttachWhole.apply(target, delta)
    return AttachDelta.apply(target, delta, holder.__dict__[state.index_name])


class AttachedParameters(DeltaHolder):
    """A module that reads its parameters as it always did, and each read finds the sparse delta."""

    spt_trains_where_read = True

    @staticmethod
    def reader(name: str) -> property:
        """Connects the parameter to its delta, wherever the code that reads it may be."""

        def read(module: AttachedParameters) -> Tensor | None:
            if not torch.compiler.is_compiling():
                if is_sharded(module._parameters.get(name)):  # type: ignore[arg-type]
                    return module._parameters[name]  # FSDP looks for its shard; no forward reads it
                if "_spt_unread" in module.__dict__:
                    with without_transforms():
                        module.take_in_edits()
                module.write_stale_deltas()
            return attached(module, name)

        return property(read)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AttachedParameters:
        self.take_in_edits()
        super()._apply(fn, recurse)
        unread: dict[str, int] = self.__dict__.get("_spt_unread", {})
        for local in unread:  # the version that a tensor had elsewhere tells nothing
            unread[local] = self._parameters[f"{local}_fp32"]._version  # type: ignore[union-attr]
        return self

    def take_in_edits(self) -> None:
        """Let count what is written into a parameter that is trained whole before its first step.

        New heads are often initialised through `weight.data`, which leaves no trace.
        """
        versions: dict[str, int] = self.__dict__.get("_spt_unread", {})
        deltas = self.sparse_deltas()
        for local, version in list(versions.items()):
            if is_wrapped(deltas[local].delta):
                continue  # given for this call alone
            if deltas[local].delta._version != version:  # it was trained or loaded since
                del versions[local]
                continue
            values, held = deltas[local].delta.data, deltas[local].target.detach()
            is_same = values.to(held.dtype) == held
            values.copy_(torch.where(is_same, values, held.to(values.dtype)))
        if not versions:
            self.__dict__.pop("_spt_unread", None)


def attach_whole(module: nn.Module, local: str, values: nn.Parameter | None = None) -> bool:
    """Train a parameter of 16 bits in fp32, in place; whoever reads it finds its values of 16 bits.

    Args:
        module: the owner of the parameter, plain or with parameters attached.
        local: the parameter's name in it.
        values: what another module that has the same parameter trains in its place.

    Returns:
        False if the module is tuned in a way that does not go with it; then nothing is changed.
    """
    held: tuple[str, ...] = ()
    if isinstance(module, (FrozenLinear, FrozenConv2d)):
        untune(module)  # it is frozen no longer
    if isinstance(module, AttachedParameters):
        held = tuple(module.sparse_deltas())
    elif isinstance(module, DeltaHolder):
        return False

    def hold(own: Any) -> None:
        own.hold_whole(local, values)
        versions = own.__dict__.setdefault("_spt_unread", {})
        versions[local] = own._parameters[f"{local}_fp32"]._version

    tune_in_place(module, AttachedParameters, hold, (*held, local))
    return True


def attach_parameter(module: nn.Module, local: str, index: Tensor | CheckedIndex) -> None:
    """Train a few entries of a parameter of any module, in place.

    The module's class is replaced by a subclass of the same name in which reading the attribute
    connects it to the delta, wherever the code that reads it may be. `untune` undoes it.

    Args:
        module: the owner of the parameter.
        local: the parameter's name in it.
        index: int32 or int64 `[nnz]`, sorted flat positions.

    Raises:
        TypeError: `index` is no int32 or int64 tensor, or the parameter is not floating.
        ValueError: positions unsorted, repeated, out of range, or on another device; no such
            parameter, or it has a delta already.
    """
    held: tuple[str, ...] = ()
    if isinstance(module, AttachedParameters):
        held = tuple(module.sparse_deltas())
    elif isinstance(module, DeltaHolder):
        raise ValueError(f"{type(module).__name__} cannot hold a delta of {local}")
    if local in held:
        raise ValueError(f"{local} has a sparse delta already")
    reads = (*held, local)
    tune_in_place(module, AttachedParameters, lambda own: own.hold_delta(local, index), reads)
