"""Parameters that tell of every call they are given to, for a while."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ...ops.torch_internals import DisableTorchFunctionSubclass
from .parameter_state import PIECES, restore, states_of


class Piece(NamedTuple):
    """Parameter `name` as numbers `start:stop` of a vector made of it; None: the whole tensor."""

    name: str
    start: int = 0
    stop: int | None = None


def pieces_of(value: Any) -> tuple[Piece, ...]:
    """Of which parameters a watched tensor holds the numbers; none for anything else."""
    pieces: tuple[Piece, ...] = getattr(value, PIECES, ())
    return pieces


def watched_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Watched tensors among the arguments of a call, also one level inside tuples and lists."""
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, (tuple, list)):
            found += [inner for inner in value if hasattr(inner, PIECES)]
        elif hasattr(value, PIECES):
            found.append(value)
    return found


class Watcher:
    """Gives tensors a class whose `__torch_function__` asks `call` instead of running a call.

    A call that is given none of them runs as it does without. `call` may run others at will.

    Args:
        call: a method `(func, args, kwargs) -> result`. Its owner is held weakly: a class lives on
            in cycles, and tensors that a model made of its parameters may do so too.
    """

    def __init__(self, call: Any) -> None:
        self._owner = weakref.ref(call.__self__)
        self._call = call.__func__
        self._classes: dict[type[Tensor], type[Tensor]] = {}

    def watch(self, tensor: Tensor, pieces: tuple[Piece, ...]) -> None:
        """Tell of the calls of `tensor`, which stays the object that it is."""
        tensor.__dict__[PIECES] = pieces
        tensor.__class__ = self._class_of(type(tensor))

    def _class_of(self, plain: type[Tensor]) -> type[Tensor]:
        if plain in self._classes:
            return self._classes[plain]
        find_owner, run = self._owner, self._call

        def ask(
            cls: type, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            owner = find_owner()
            with DisableTorchFunctionSubclass():
                if owner is None:
                    return func(*args, **(kwargs or {}))
                return run(owner, func, args, kwargs or {})

        members: dict[str, Any] = {"__torch_function__": classmethod(ask)}
        made = self._classes[plain] = type(f"Watched{plain.__name__}", (plain,), members)
        return made

    @contextlib.contextmanager
    def watching(
        self, parameters: Mapping[str, Tensor], reached: Callable[[str], None]
    ) -> Iterator[None]:
        """Watch parameters in a `with` block, and let them ask for gradients.

        Args:
            parameters: by name; left as they were, their hooks and `.grad` included.
            reached: is told the name of one that a gradient comes to, which is then refused.
        """
        before = states_of(parameters.values())
        try:
            for name, parameter in parameters.items():
                parameter.requires_grad = True
                # in place of the model's own, such as those of an optimizer in the backward
                refuse = functools.partial(_refuse, name, parameter, reached)
                parameter._backward_hooks = {0: refuse}
                parameter._post_accumulate_grad_hooks = {}
                self.watch(parameter, (Piece(name),))
            yield
        finally:
            restore(before)


def _refuse(name: str, parameter: Tensor, reached: Callable[[str], None], grad: Tensor) -> None:
    reached(name)
    with DisableTorchFunctionSubclass():
        parameter.requires_grad = False  # autograd then accumulates nothing
