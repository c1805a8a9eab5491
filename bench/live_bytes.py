"""Counts the bytes of live tensors while real computations run on them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Books each storage that an operation makes, at its size, until its last tensor is gone.

    Attributes:
        peak: most bytes that were alive at once.

    Args:
        given: tensors that were there before, and that are not counted: weights and inputs.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._known: dict[int, Any] = {}
        for tensor in given:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._book(leaf)
        return result

    def _book(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        known = self._known.get(address)
        if known is not None and known() is storage:
            return

        def strike_off(reference: Any) -> None:
            self._live -= size
            if self._known.get(address) is reference:
                del self._known[address]

        self._live += size
        self.peak = max(self.peak, self._live)
        self._known[address] = weakref.ref(storage, strike_off)
