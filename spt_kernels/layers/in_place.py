"""Tuning of a module where it is, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .delta_holder import DeltaHolder
from .sparse_delta import untag
from .tuned_class import change_class, plain_again, plain_class, tuned_class


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
    module._leave_row_major()
    added = [module._parameters.get(name) for name in module.added_names()]
    for parameter in (*added, *(delta.target for delta in module.sparse_deltas().values())):
        if parameter is not None:  # an optimizer may have it still
            untag(parameter)
    plain_again(module, module.added_names())
