"""A layer that runs with a LoRA or Adapter for a while: it changes its class, and has it back.

A forward hook would do the same in eager code. Compiled code notices another class, and does not
notice a hook.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..model.check import IN_A_BANK
from .structured import StructuredGroup, add_structured


class _WithStructured:
    """Mixed into the class of a Linear or Conv2d."""

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output with what its LoRA or Adapter adds."""
        output: Tensor = super().forward(input)  # type: ignore[misc]
        if torch.is_grad_enabled():
            output = output.clone()  # autograd may need the layer's own
        own: Any = self
        add_structured(own, input, output, (own.__dict__[IN_A_BANK],), 1)
        return output

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Be copied and pickled with what is on it: its class cannot be found by its name."""
        inherited = getattr(super(), "__getstate__", None)  # absent from `object` before 3.11
        state = dict(self.__dict__) if inherited is None else inherited()
        return _empty, (type(self).__mro__[2],), state


def put_on(module: nn.Module, group: StructuredGroup) -> None:
    """Let a plain layer run with the part of one task."""
    module.__dict__[IN_A_BANK] = group
    kind: Any = type(module)
    module.__class__ = _class_of(kind)


def plain_again(module: nn.Module) -> None:
    """Undo `put_on`, wherever that has come to."""
    if isinstance(module, _WithStructured):
        module.__class__ = type(module).__mro__[2]
    module.__dict__.pop(IN_A_BANK, None)


def _empty(plain: Any) -> Any:
    return object.__new__(_class_of(plain))


@functools.cache
def _class_of(plain: Any) -> Any:
    named = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, (_WithStructured, plain), named)
