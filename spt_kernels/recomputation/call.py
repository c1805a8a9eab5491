"""`Call`: what a region was called with, held so that it can be called once more."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_is_leaf, tree_iter, tree_map

from .conditions import Conditions, NotRecomputable, WritesCache
from .packed import Elsewhere, Kept

_CONTAINERS = (list, tuple, dict)

Hooks = Any  # of saved tensors: None, or what packs and what unpacks


class NormCall(NamedTuple):
    """A call of a norm that has made an argument of a region."""

    norm: nn.Module
    x: Tensor
    result: Tensor


class Given:
    """A tensor that a region was called with, for the same call again."""

    __slots__ = ("_kept", "requires_grad")

    def __init__(self, tensor: Tensor, where: str, hooks: Any) -> None:
        self.requires_grad, alone = tensor.requires_grad, tensor.detach()
        self._kept = Kept(alone, where) if hooks is None else Elsewhere(alone, hooks)

    def leaf(self) -> Tensor:
        """The same values as a leaf, of which a graph of its own may begin."""
        return self._kept.read().detach().requires_grad_(self.requires_grad)


class Entry:
    """What a norm gave to the region behind it, made again each time: one elementwise pass.

    Args:
        norm: the module; it keeps no memory of its calls.
        given: what it was called with.
        requires_grad: whether its result did.
        conditions: of the region.
    """

    __slots__ = ("_conditions", "_given", "_norm", "_requires_grad")

    def __init__(
        self, norm: Any, given: Given, requires_grad: bool, conditions: Conditions
    ) -> None:
        self._norm, self._given, self._requires_grad = norm, given, requires_grad
        self._conditions = conditions

    def read(self) -> Tensor:
        """What the norm gives."""
        self._conditions.check()
        with torch.no_grad(), self._conditions.again():
            made: Tensor = self._norm(self._given.leaf().detach())
        return made

    def leaf(self) -> Tensor:
        """The same as a leaf."""
        return self.read().requires_grad_(self._requires_grad)


class Call:
    """The arguments of a call: tensors as leaves of a graph to be, all else as it is.

    Args:
        args: by position.
        kwargs: by name.
        made_by: the norm that has made one of them, which is then not held.
        conditions: of the region.
        outer: hooks that were in use around the region, and keep what it is called with.

    Raises:
        WritesCache: one is a cache of keys and values, which a second call would find longer.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        made_by: NormCall | None,
        conditions: Conditions,
        outer: Hooks,
    ) -> None:
        self._held: dict[int, Given | Entry] = {}  # by the identity of a tensor
        # objects that may hold tensors as well, and what they hold
        self._objects: list[tuple[Any, dict[Any, Any]]] = []
        self._where, self._outer = conditions.name, outer
        self.entry: Entry | None = None
        if made_by is not None:
            norm, x, result = made_by
            given = Given(x, self._where, outer)
            self.entry = Entry(norm, given, result.requires_grad, conditions)
            self._held[id(result)] = self.entry
        self._names = tuple(kwargs)
        self._arguments = [self._hold(value) for value in (*args, *kwargs.values())]
        self._held.clear()

    def _hold(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            known = self._held.get(id(argument))
            if known is None:
                known = self._held[id(argument)] = Given(argument, self._where, self._outer)
            return known
        if hasattr(argument, "get_seq_length"):  # as each `Cache` of transformers has
            raise WritesCache(
                f"{self._where} writes into a cache of keys and values, {type(argument).__name__}, "
                "and cannot be computed again: call the model with use_cache=False, or set it in "
                "model.config, of an encoder and decoder in model.decoder.config"
            )
        if _is_container(argument):
            return tree_map(self._hold, argument)
        if hasattr(argument, "__dict__") and not isinstance(argument, nn.Module):
            self._objects.append((argument, _contents(argument)))
        return argument

    def check_objects(self) -> None:
        """Raise where the call has put something else into an object that it was given.

        Raises:
            NotRecomputable: it has, and a second call would find that there.
        """
        for value, before in self._objects:
            now = _contents(value)
            is_longer = isinstance(value, list) and len(now) != len(before)
            if is_longer or any(now.get(k) is not v for k, v in before.items()):
                raise NotRecomputable(
                    f"{self._where} changes the {type(value).__name__} that it is called with, and "
                    "cannot be computed again; leave this block out of spt.recompute"
                )
        self._objects.clear()

    def again(self) -> tuple[list[Any], dict[str, Any]]:
        """The arguments once more; those that were one tensor are one again."""
        made: dict[int, Tensor] = {}
        arguments = [_released(argument, made) for argument in self._arguments]
        first = len(arguments) - len(self._names)
        return arguments[:first], dict(zip(self._names, arguments[first:], strict=True))


def _released(argument: Any, made: dict[int, Tensor]) -> Any:
    # no function within `again`: one that calls itself would hold what is made until garbage is
    # collected
    if isinstance(argument, (Given, Entry)):
        if id(argument) not in made:
            made[id(argument)] = argument.leaf()
        return made[id(argument)]
    if _is_container(argument):
        return tree_map(partial(_released, made=made), argument)
    return argument


def _is_container(argument: Any) -> bool:
    """Whether it is taken apart; a class of its own that torch does not know is an object."""
    return isinstance(argument, _CONTAINERS) and not tree_is_leaf(argument)


def _contents(value: Any) -> dict[Any, Any]:
    """The tensors in an object of any class, by their places; of a list whatever is in it."""
    held = dict(vars(value)) if hasattr(value, "__dict__") else {}
    if isinstance(value, list):
        return held | dict(enumerate(value))
    if isinstance(value, dict):
        held |= value
    return {key: own for key, own in held.items() if isinstance(own, Tensor)}


def tensors_in(args: Iterable[Any]) -> list[Tensor]:
    """The tensors among the arguments of a call, and in the containers among them."""
    found = []
    for argument in args:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, _CONTAINERS):
            found += [leaf for leaf in tree_iter(argument) if isinstance(leaf, Tensor)]
    return found
