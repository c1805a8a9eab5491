"""The ledger of live storages: what was allocated and freed in a step, and what for."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

CATEGORIES = ("weights", "optimizer", "gradients", "activations", "temporary")


class Ledger(TorchDispatchMode):
    """Books every storage of a fake tensor that an operation makes while the mode is active.

    A storage is booked once, at its nominal size, and struck off when its last tensor dies. What it
    was for is often only known later (a tensor turns out to be a gradient once the backward is
    over), so `mark` may come at any time, and `peak` sorts out the rest: what the forward made and
    left behind are activations.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: list[int] = []  # by entry, in bytes
        self._categories: dict[int, str] = {}  # entry -> category, where known
        self._live: dict[int, tuple[int, Any]] = {}  # address -> entry, weak reference
        self._events: list[tuple[int, int]] = []  # (entry, +1 allocated or -1 freed)
        self._forward: set[int] | None = None  # entries made since the forward began

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            # a sparse tensor has no storage: its indices and values are tensors of their own
            if isinstance(leaf, FakeTensor) and leaf.layout == torch.strided:
                self._book(leaf)
        return result

    def mark(self, tensors: Iterable[Tensor | None], category: str) -> None:
        """Say what the storages of some tensors are for, booking them if they are new."""
        for tensor in tensors:
            if isinstance(tensor, FakeTensor) and tensor.layout == torch.strided:
                self._categories.setdefault(self._book(tensor), category)

    def begin_forward(self) -> None:
        """From here on, what stays alive until `end_forward` is an activation."""
        self._forward = set()

    def end_forward(self) -> None:
        """Book as activations all that the forward made and that is still alive."""
        alive = {entry for entry, _ in self._live.values()}
        for entry in alive & (self._forward or set()):
            self._categories.setdefault(entry, "activations")
        self._forward = None

    def moment(self) -> int:
        """Now, for `peak` to begin at."""
        return len(self._events)

    def peak(self, since: int = 0) -> dict[str, int]:
        """Bytes by category at the first moment, from `since` on, when most bytes were alive.

        What a step leaves behind, as the optimizer's state, was there before the next one: it
        counts as if it had been there from `since` on. Gradients do not, as they are dropped.
        """
        left = {entry for entry, _ in self._live.values()}
        left -= {entry for entry in left if self._categories.get(entry) == "gradients"}
        before, after = self._events[:since], self._events[since:]
        events = [(entry, +1) for entry, _ in after if entry in left]
        events = [*before, *events, *(event for event in after if event[0] not in left)]
        live = highest = 0
        at = 0
        for position, (entry, sign) in enumerate(events):
            live += sign * self._sizes[entry]
            if live > highest and position >= since:
                highest, at = live, position + 1
        totals = dict.fromkeys(CATEGORIES, 0)
        for entry, sign in events[:at]:
            totals[self._categories.get(entry, "temporary")] += sign * self._sizes[entry]
        return totals

    def _book(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        # not data_ptr: a storage of a fake tensor has no data
        address = storage._cdata
        known = self._live.get(address)
        if known is not None and known[1]() is storage:
            return known[0]
        entry = len(self._sizes)
        self._sizes.append(storage.nbytes())
        self._events.append((entry, +1))
        if self._forward is not None:
            self._forward.add(entry)

        def strike_off(_: Any) -> None:
            self._events.append((entry, -1))
            if self._live.get(address, (None,))[0] == entry:
                del self._live[address]

        self._live[address] = (entry, weakref.ref(storage, strike_off))
        return entry
