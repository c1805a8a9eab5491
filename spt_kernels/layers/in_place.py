"""Tuning of a module where it is, and the way back, for good or for a while."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .all_or_nothing import all_or_nothing
from .deltas.delta_holder import DeltaHolder
from .deltas.held_values import gather
from .deltas.late_optimizer import mark_dropped
from .deltas.sparse_delta import hold_values, restore_deltas, untag, write_deltas
from .deltas.written_state import WrittenState
from .tuned_class import (
    change_class,
    made_again,
    made_from,
    plain_again,
    plain_class,
    taken_out,
    tuned_class,
)


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
    before, names = type(module), {*module._parameters}
    flags = [(p, p.requires_grad) for p in module._parameters.values() if p is not None]
    change_class(module, tuned_class(tuner, module, reads))
    try:
        tune(module)
    except BaseException:
        if before is plain_class(module):
            untune(module)
        module.__class__ = before
        for name in module._parameters.keys() - names:
            del module._parameters[name]
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
def set_aside(module: nn.Module, undo: ExitStack | None = None) -> SetAside:
    """Make a tuned module plain, with its base values; `put_back` makes it what it was.

    What is trained whole in fp32 keeps no base values: its parameter is left as it is. On an error
    the module is as it was.

    Args:
        module: tuned.
        undo: of a larger exchange: takes the way back, which needs no memory but that of one weight
            in channels-last format.
    """
    assert isinstance(module, DeltaHolder)
    kind: Any = type(module)
    deltas = module.sparse_deltas()
    write_deltas(delta for delta in deltas.values() if not delta.is_fresh)
    inside = {n: d for n, d in deltas.items() if not d.beside}
    written = {n: (gather(d.target, d.index), WrittenState()) for n, d in inside.items()}
    for local, (_, state) in written.items():
        state.record(deltas[local].delta)
    formats = dict(vars(module).get("_spt_formats", {}))
    with all_or_nothing(undo) as steps:
        steps.callback(hold_values, inside.values(), [values for values, _ in written.values()])
        restore_deltas(deltas.values())
        steps.callback(_joined, module, [*inside], formats)
        _part(module)
        attributes, parameters = taken_out(module, module.added_names())
        steps.callback(_tuned, module, kind, attributes, parameters)
        change_class(module, plain_class(module))
    return SetAside(kind, attributes, parameters, written)


@torch.no_grad()
def put_back(module: Any, aside: SetAside, undo: ExitStack | None = None) -> None:
    """Tune a module as it was tuned before, with the very parameters that it had.

    It may be elsewhere by now, or of another dtype. On an error it is plain as it was, but for
    whether its parameters require a gradient, and what was set aside can be put back later.

    Args:
        module: plain.
        aside: of the same module.
        undo: of a larger exchange: takes the way back, which needs no memory but that of one weight
            in channels-last format.
    """
    own = module._parameters
    device = next(p.device for p in own.values() if p is not None)
    for parameter in aside.parameters.values():
        if parameter.device != device:
            parameter.data = parameter.data.to(device)
            parameter.grad = None if parameter.grad is None else parameter.grad.to(device)
    with all_or_nothing(undo) as steps:
        _tuned(module, aside.tuned_class, aside.attributes, aside.parameters)
        steps.callback(_plain, module)
        _fill(module, aside, device, steps)


def _fill(module: Any, aside: SetAside, device: torch.device, undo: ExitStack) -> None:
    """Bring what a module was tuned by up to what the module is now, and write it."""
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
    deltas = module.sparse_deltas()
    undo.callback(restore_deltas, deltas.values())
    for local, (values, state) in aside.written.items():
        delta = deltas[local]
        if state.matches(delta.delta) and values.dtype == delta.target.dtype:
            hold_values([delta], [values.to(device)])
        else:
            delta.write()


def _tuned(module: nn.Module, cls: Any, attributes: Any, parameters: Any) -> None:
    """Give a plain module a tuned class, and what that has added to it."""
    module.__dict__.update(attributes)
    module._parameters.update(parameters)
    change_class(module, cls)


def _plain(module: Any) -> None:
    """Undo `_tuned`; values stay as they are."""
    _part(module)
    plain_again(module, module.added_names())


def _joined(module: Any, names: list[str], formats: dict[str, torch.memory_format]) -> None:
    """Undo `_part`."""
    module._make_row_major(names)
    if formats:
        module.__dict__["_spt_formats"] = formats
    module._tag_all()


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
