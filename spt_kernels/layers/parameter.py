"""Sparse deltas of single parameters that a module reads as attributes: vectors, tokens, tables."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .delta_holder import DeltaHolder
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


def attach_parameter(module: nn.Module, local: str, index: Tensor | CheckedIndex) -> None:
    """Train a few entries of a parameter of any module, in place.

    The module's class is replaced by a subclass of the same name in which reading the attribute
    connects it to the delta, wherever the code that reads it may be. `detach_parameters` undoes it.

    Args:
        module: the owner of the parameter.
        local: the parameter's name in it.
        index: int32 or int64 `[nnz]`, sorted flat positions.

    Raises:
        TypeError: `index` is no int32 or int64 tensor, or the parameter is not floating.
        ValueError: positions unsorted, repeated, out of range, or on another device; no such
            parameter, or it has a delta already.
    """
    held = _attached_names(module)
    if local in held:
        raise ValueError(f"{local} has a sparse delta already")
    base = _plain_class(module)
    if not held and isinstance(module, DeltaHolder):
        raise ValueError(f"{type(module).__name__} cannot hold a delta of {local}")
    previous = type(module)
    module.__class__ = _attached_class(base, (*held, local))  # type: ignore[arg-type]
    try:
        module.hold_delta(local, index)  # type: ignore[operator]
    except BaseException:
        module.__class__ = previous
        raise


def detach_parameters(module: nn.Module) -> None:
    """Give a module its own class back; its parameters stay as they are written now."""
    if _attached_names(module):
        module.release_deltas()  # type: ignore[operator]
        module.__class__ = _plain_class(module)


def is_attached(module: nn.Module) -> bool:
    """Whether `attach_parameter` has been at this module."""
    return bool(_attached_names(module))


def _plain_twin(module: DeltaHolder) -> nn.Module:
    """A module of the plain class with the same parameters, buffers and children, for reading."""
    base = _plain_class(module)
    twin = base.__new__(base)
    hidden = {name for local in module._spt_states for name in module.delta_local_names(local)}
    twin.__dict__.update({k: value for k, value in vars(module).items() if k not in hidden})
    kept = {name: value for name, value in module._parameters.items() if name not in hidden}
    twin.__dict__["_parameters"] = kept
    twin.__dict__["_buffers"] = dict(module._buffers)
    return twin


def _attached_names(module: nn.Module) -> tuple[str, ...]:
    return getattr(type(module), "_attached_names", ())


def _plain_class(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), "_plain_class", type(module))


@functools.cache
def _attached_class(base: Any, names: tuple[str, ...]) -> type[nn.Module]:
    members: dict[str, Any] = {name: _attached_property(name) for name in names}
    members |= {
        "_attached_names": names,
        "_plain_class": base,
        "plain": property(_plain_twin),
        "__reduce_ex__": _reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (DeltaHolder, base), members)


def _attached_property(name: str) -> property:
    def read(module: DeltaHolder) -> Tensor | None:
        if not torch.compiler.is_compiling():
            module.write_stale_deltas()
        return attached(module, name)

    return property(read)


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    # a class made at run time cannot be found again by its name
    return _empty, (_plain_class(module), _attached_names(module)), module.__getstate__()  # type: ignore


def _empty(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = _attached_class(base, names)  # type: ignore[arg-type]
    return cls.__new__(cls)
