"""Sparse deltas of single parameters that a module reads as attributes: vectors, tokens, tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .delta_holder import DeltaHolder, tune_in_place
from .position_index import CheckedIndex


class AttachDelta(torch.autograd.Function):
    """A parameter as it is, through which the gradient finds its sparse delta.

    The parameter holds base + delta already, so that the forward gives a view of it and computes
    nothing. The gradient of the whole parameter exists for a moment in the backward: meant for
    parameters that are small, or whose gradient is dense anyway.
    """

    @staticmethod
    def forward(ctx: Any, target: Tensor, delta: Tensor, index: Tensor) -> Tensor:
        """A view of `target`; to a compiler, which takes none from a function, a copy."""
        ctx.save_for_backward(index)
        ctx.delta_dtype = delta.dtype
        return target.clone() if torch.compiler.is_compiling() else target.view_as(target)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient at the index, which may be differentiated further."""
        (index,) = ctx.saved_tensors
        return None, grad.reshape(-1).index_select(0, index).to(ctx.delta_dtype), None


def attached(holder: DeltaHolder, local: str) -> Tensor | None:
    """A parameter of a module, connected to its sparse delta where it has one."""
    target = holder._parameters[local]
    if local not in holder._spt_states:
        return target
    delta_name, index_name, _ = holder.delta_local_names(local)
    delta, index = holder._parameters[delta_name], getattr(holder, index_name)
    assert target is not None
    assert delta is not None
    if not (torch.is_grad_enabled() and delta.requires_grad and delta.numel() > 0):
        return target
    return AttachDelta.apply(target, delta, index)


class AttachedParameters(DeltaHolder):
    """A module that reads its parameters as it always did, and each read finds the sparse delta."""

    @staticmethod
    def reader(name: str) -> property:
        """Connects the parameter to its delta, wherever the code that reads it may be."""

        def read(module: DeltaHolder) -> Tensor | None:
            if not torch.compiler.is_compiling():
                module.write_stale_deltas()
            return attached(module, name)

        return property(read)


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
