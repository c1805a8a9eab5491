"""A memory that runs out at a chosen allocation, to see what is left of what was begun."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ShortMemory(TorchDispatchMode):
    """Counts allocations, and refuses some.

    Attributes:
        refused: numbers of those, from 0.
        seen: how many there were.
    """

    def __init__(self, refused: range = range(0)) -> None:
        super().__init__()
        self.refused, self.seen = refused, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_memory(t) for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        if any(t.numel() and _memory(t) not in known for t in _tensors(out)):
            self.seen += 1
            if self.seen - 1 in self.refused:
                raise torch.OutOfMemoryError(f"there is none for {func}")
        return out


@contextmanager
def running_out(refused: range) -> Iterator[None]:
    """Expect the error that comes of such a memory."""
    with pytest.raises(torch.OutOfMemoryError), ShortMemory(refused):
        yield


def allocations(step: Callable[[], object]) -> int:
    """How many a step makes."""
    with ShortMemory() as memory:
        step()
    return memory.seen


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
