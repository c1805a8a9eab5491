"""Rows that were chosen by values, of which each sample has as many as happen to be chosen."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .call_names import call_name

# what gives as many rows as values say
_CHOOSES = frozenset(
    {"nonzero", "argwhere", "masked_select"}
    | {"unique", "_unique2", "unique_dim", "unique_consecutive"}
)
# what gives places in an order that values say, and which of its arguments is the dimension
_ORDERS = MappingProxyType({"sort": 1, "argsort": 1, "topk": 2})
_MASKS = (torch.bool, torch.uint8)
# what moves rows, joins them or leaves some out
_KEEPS_ROWS = frozenset(
    {"view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"}
    | {"t", "transpose", "permute", "movedim", "swapaxes", "T", "mT", "expand", "expand_as"}
    | {"cat", "concat", "concatenate", "hstack", "vstack", "stack", "pad", "repeat", "tile"}
    | {"split", "chunk", "unbind", "narrow", "select", "__getitem__", "repeat_interleave", "roll"}
)
# what puts rows back where they came from: the result is of the first argument
_PUTS_BACK = frozenset(
    {"index_put", "index_put_", "index_add", "index_add_", "index_copy", "index_copy_"}
    | {"masked_scatter", "masked_scatter_", "scatter", "scatter_", "scatter_add", "scatter_add_"}
    | {"scatter_reduce", "scatter_reduce_", "index_reduce", "index_reduce_", "__setitem__"}
)
_JOINS = frozenset({"cat", "concat", "concatenate"})


class Selections(TorchFunctionMode):
    """Knows, of what a model computes while this is on, the tensors with chosen rows.

    Where a mask picks tokens of all samples (`x[mask]`, `x[mask.nonzero()]`), two samples may have
    as many in one batch and not in the next, and the order of the rows does not tell whose they
    are. Nor does it where tokens are sorted, as by the expert of each (`x[experts.argsort()]`), or
    where the model goes from sample to sample and joins what it has of each. What is put back into
    a tensor with a place for each token is as any other there.

    Args:
        samples: of the batch that runs.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self._samples = samples
        self._chosen, self._of_one_sample = _Known(), _Known()

    def hold_any(self, values: Iterable[Any]) -> bool:
        """Whether one of these values, or what is in their lists and tuples, has chosen rows."""
        return self._chosen.has_any(values)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a call, and note what it gives."""
        kwargs, name = kwargs or {}, call_name(func)
        output = func(*args, **kwargs)
        made = tuple(output) if name == "__iter__" else output
        for tensor in _tensors_in((made,)):
            if self._has_chosen_rows(tensor, name, args, kwargs):
                self._chosen.add(tensor)
            elif self._is_of_one_sample(tensor, name, args, kwargs):
                self._of_one_sample.add(tensor)
        return iter(made) if name == "__iter__" else output

    def _has_chosen_rows(self, made: Tensor, name: str, args: Any, kwargs: Any) -> bool:
        if name in _CHOOSES or _chooses(name, args, kwargs) or self._orders(name, args, kwargs):
            return True
        if name in _JOINS and _dim(args, kwargs) == 0 and self._of_one_sample.has_any(args[:1]):
            return True
        return self._chosen.goes_on_in(made, name, args, kwargs)

    def _orders(self, name: str, args: Any, kwargs: Any) -> bool:
        """Whether a call puts rows in order; where they are whole samples, each stays one row."""
        if name not in _ORDERS or not args or args[0].shape[:1] in ((), (self._samples,)):
            return False
        return _dim(args, kwargs, _ORDERS[name], -1) in (0, -args[0].ndim)

    def _is_of_one_sample(self, made: Tensor, name: str, args: Any, kwargs: Any) -> bool:
        source = args[0] if args else None
        if isinstance(source, Tensor) and source.shape[:1] == (self._samples,):
            if name == "__iter__" or (name in ("unbind", "select") and not _dim(args, kwargs)):
                return True
            if name in ("split", "chunk") and made.shape[:1] == (1,):
                return True
            if name == "__getitem__":
                first = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
                return isinstance(first, int) and not isinstance(first, bool)
        return self._of_one_sample.goes_on_in(made, name, args, kwargs)


class _Known:
    """Tensors of one kind, for as long as they are there."""

    def __init__(self) -> None:
        self._by_id: dict[int, weakref.ref[Tensor]] = {}

    def add(self, tensor: Tensor) -> None:
        """Let a tensor be one of them."""
        self._by_id[id(tensor)] = weakref.ref(tensor)

    def has_any(self, values: Iterable[Any]) -> bool:
        """Whether one of these values, or what is in their lists and tuples, is one."""
        return bool(self._by_id) and next(self._among(values), None) is not None

    def goes_on_in(self, made: Tensor, name: str, args: Any, kwargs: Any) -> bool:
        """Whether the rows of what a call has made are those of one that it was given."""
        if not self._by_id:
            return False
        given = args[:1] if name in _PUTS_BACK else (*args, *kwargs.values())
        if name in _KEEPS_ROWS or name in _PUTS_BACK:
            return self.has_any(given)
        return any(made.shape[:1] == value.shape[:1] for value in self._among(given))

    def _among(self, values: Iterable[Any]) -> Iterator[Tensor]:
        for tensor in _tensors_in(values):
            found = self._by_id.get(id(tensor))
            if found is not None and found() is tensor:
                yield tensor


def _dim(args: tuple[Any, ...], kwargs: Any, place: int = 1, default: int = 0) -> int:
    """Of a call that takes it as its argument number `place`."""
    dim: int = kwargs.get("dim", kwargs.get("axis", args[place] if len(args) > place else default))
    return dim


def _chooses(name: str, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Whether a call has as many rows as its arguments say by their values."""
    if name == "where":
        return len(args) + len(kwargs) == 1
    if name == "repeat_interleave":
        return any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values()))
    if name != "__getitem__":
        return False
    first = args[1][:1] if isinstance(args[1], tuple) else args[1:2]
    return any(isinstance(index, Tensor) and index.dtype in _MASKS for index in first)


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among values and in their lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors_in(value)
