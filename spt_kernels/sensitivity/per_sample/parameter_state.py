"""What of a parameter a measurement changes, to be put back as often as need be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

PIECES = "_spt_pieces"  # attribute of a watched tensor


class ParameterState(NamedTuple):
    """A parameter's class, flag, gradient and hooks.

    To put them back twice is as good as once: where Ctrl-C comes in the midst of it, whoever holds
    an earlier state of the same parameter does it again.
    """

    parameter: Tensor
    plain: type[Tensor]
    requires_grad: bool
    grad: Tensor | None
    hooks: Any
    post_hooks: Any

    @classmethod
    def of(cls, parameter: Tensor) -> ParameterState:
        """The state that it is in."""
        hooks, post_hooks = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
        grad = parameter.grad
        return cls(parameter, type(parameter), parameter.requires_grad, grad, hooks, post_hooks)

    def restore(self) -> None:
        """Put it back, where it has changed."""
        parameter = self.parameter
        if type(parameter) is not self.plain:
            parameter.__class__ = self.plain
        parameter.__dict__.pop(PIECES, None)
        if parameter._backward_hooks is not self.hooks:
            parameter._backward_hooks = self.hooks
        if parameter._post_accumulate_grad_hooks is not self.post_hooks:
            parameter._post_accumulate_grad_hooks = {}  # None alone leaves those that are set
            parameter._post_accumulate_grad_hooks = self.post_hooks
        if parameter.grad is not self.grad:
            parameter.grad = self.grad
        if parameter.requires_grad != self.requires_grad:
            parameter.requires_grad = self.requires_grad


def states_of(parameters: Iterable[Tensor]) -> list[ParameterState]:
    """The state of each."""
    return [ParameterState.of(parameter) for parameter in parameters]


def restore(states: Iterable[ParameterState]) -> None:
    """Put all back."""
    for state in states:
        state.restore()
