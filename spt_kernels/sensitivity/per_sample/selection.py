"""Rows that were chosen by values, of which each sample has as many as happen to be chosen."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
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


class Selections(TorchFunctionMode):
    """Knows, of what a model computes while this is on, the tensors with chosen rows.

    Where a mask picks tokens of all samples (`x[mask]`, `x[mask.nonzero()]`), two samples may have
    as many in one batch and not in the next, and the order of the rows does not tell whose they
    are. What is put back into a tensor with a place for each token is as any other there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._by_id: dict[int, weakref.ref[Tensor]] = {}

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor has chosen rows."""
        found = self._by_id.get(id(tensor))
        return found is not None and found() is tensor

    def hold_any(self, values: Iterable[Any]) -> bool:
        """Whether one of these values, or what is in their lists and tuples, is such a tensor."""
        return bool(self._by_id) and any(map(self.holds, _tensors_in(values)))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a call, and note what it gives."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = call_name(func)
        for made in _tensors_in((output,)):
            if self._has_chosen_rows(made, name, args, kwargs):
                self._by_id[id(made)] = weakref.ref(made)
        return output

    def _has_chosen_rows(self, made: Tensor, name: str, args: Any, kwargs: Any) -> bool:
        if name in _CHOOSES or _chooses(name, args, kwargs):
            return True
        given = args[:1] if name in _PUTS_BACK else (*args, *kwargs.values())
        chosen = [value for value in _tensors_in(given) if self.holds(value)]
        if name in _KEEPS_ROWS or name in _PUTS_BACK:
            return bool(chosen)
        return any(made.shape[:1] == value.shape[:1] for value in chosen)


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
