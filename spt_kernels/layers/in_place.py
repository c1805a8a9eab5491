"""Tuning of a module where it is, and the way back, for good or for a while."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .delta_holder import DeltaHolder
from .late_optimizer import mark_dropped
from .saved_deltas import gather
from .sparse_delta import restore_deltas, untag, write_deltas
from .tuned_class import (
    change_class,
    made_again,
    made_from,
    plain_again,
    plain_class,
    taken_out,
    tuned_class,
)
from .written_state import WrittenState


def tune_in_place(
    module: nn.Module, tuner: Any, tune: Callable[[Any], None], reads: tuple[str, ...] = ()
) -> None:
    """Give a module its tuned class and what that holds; on an error it is as it was.

    Args:
        module: plain, or tuned in a way that `tuner` goes on with.
        tuner: subclass of `DeltaHolder`.
        tune: called with the module once it has its class.
        reads: see `tuned_class`.
    """
    before = type(module)
    flags = [(p, p.requires_grad) for p in module._parameters.values() if p is not None]
    change_class(module, tuned_class(tuner, module, reads))
    try:
        tune(module)
    except BaseException:
        if before is plain_class(module):
            untune(module)
        module.__class__ = before
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def untune(module: nn.Module) -> None:
    """Make a tuned module plain again: the same object, its parameters as they are written now."""
    assert isinstance(module, DeltaHolder)
    mark_dropped(_part(module), module)
    plain_again(module, module.added_names())


@dataclass(frozen=True, eq=False)
class SetAside:
    """What makes a module a tuned one, while it is plain.

    Attributes:
        tuned_class: the class that it had.
        attributes: what tuning had added to it.
        parameters: the trained parameters that it had, which an optimizer may go on holding.
        written: parameter name -> the values at the positions of its delta, in its own dtype, and
            which state of the delta they are.
    """

    tuned_class: type[nn.Module]
    attributes: dict[str, Any]
    parameters: dict[str, nn.Parameter]
    written: dict[str, tuple[Tensor, WrittenState]]

    def __reduce__(self) -> tuple[Any, ...]:
        # a class made at run time cannot be found again by its name
        made_of: Any = made_from(self.tuned_class)
        return _set_aside_of, (made_of, self.attributes, self.parameters, self.written)


def _set_aside_of(made_of: Any, *rest: Any) -> SetAside:
    return SetAside(made_again(made_of), *rest)


@torch.no_grad()
def set_aside(module: nn.Module) -> SetAside:
    """Make a tuned module plain, with its base values; `put_back` makes it what it was.

    What is trained whole in fp32 keeps no base values: its parameter is left as it is.
    """
    assert isinstance(module, DeltaHolder)
    kind: Any = type(module)
    deltas = module.sparse_deltas()
    write_deltas(delta for delta in deltas.values() if not delta.is_fresh)
    inside = {n: d for n, d in deltas.items() if not d.beside}
    written = {n: (gather(d.target, d.index), WrittenState()) for n, d in inside.items()}
    for local, (_, state) in written.items():
        state.record(deltas[local].delta)
    restore_deltas(deltas.values())
    _part(module)
    attributes, parameters = taken_out(module, module.added_names())
    change_class(module, plain_class(module))
    return SetAside(kind, attributes, parameters, written)


@torch.no_grad()
def put_back(module: Any, aside: SetAside) -> None:
    """Tune a module as it was tuned before, with the very parameters that it had.

    It may be elsewhere by now, or of another dtype.
    """
    own = module._parameters
    device = next(p.device for p in own.values() if p is not None)
    module.__dict__.update(aside.attributes)
    own.update(aside.parameters)
    for parameter in aside.parameters.values():
        if parameter.device != device:
            parameter.data = parameter.data.to(device)
            parameter.grad = None if parameter.grad is None else parameter.grad.to(device)
    change_class(module, aside.tuned_class)
    module._make_row_major(aside.written)
    deltas = module.sparse_deltas()
    for local, delta in deltas.items():
        _, index_name, original_name = module.delta_local_names(local)
        delta.target.requires_grad_(False)
        index = module.__dict__[index_name] = delta.index.to(device)
        if delta.beside:
            continue
        original = gather(delta.target, index)
        module.__dict__[original_name] = original.zero_() if delta.whole else original
    if any(delta.index.device != device for delta in deltas.values()):
        module._index_changed()
    module._tag_all()
    for local, (values, state) in aside.written.items():
        delta = module.sparse_deltas()[local]
        if state.matches(delta.delta) and values.dtype == delta.target.dtype:
            delta.target.view(-1)[delta.index.long()] = values.to(device)
            delta.written.record(delta.delta)
        else:
            delta.write()


def _part(module: DeltaHolder) -> list[nn.Parameter]:
    """Give parameters their own format back, and let none lead to a module that is plain.

    Returns:
        What was trained in it, which an optimizer may have still.
    """
    module._leave_row_major()
    held = [module._parameters.get(name) for name in module.added_names()]
    added = [parameter for parameter in held if parameter is not None]
    for parameter in (*added, *(delta.target for delta in module.sparse_deltas().values())):
        untag(parameter)
    return added
