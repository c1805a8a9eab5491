"""The ledger of live storages: what was allocated and freed in a step, and what for."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_iter

from .call_mode import CallMode
from .fake_view import call

CATEGORIES = ("weights", "optimizer", "gradients", "activations", "temporary")


class Ledger(CallMode):
    """Books every storage that an operation makes while the mode is active, of fakes by default.

    A storage is booked once, at its nominal size, and struck off when its last tensor dies. What it
    was for is often only known later (a tensor turns out to be a gradient once the backward is
    over), so `mark` may come at any time, and `peak` sorts out the rest: what the forward made and
    left behind are activations.

    Args:
        counted: the type of tensors that are booked.
    """

    BLOCK_BYTES = 1  # sizes are rounded up to multiples of this

    def __init__(self, counted: type[Tensor] = FakeTensor) -> None:
        super().__init__()
        self._counted = counted
        self._sizes: list[int] = []  # by entry, in bytes
        self._categories: dict[int, str] = {}  # entry -> category, where known
        self._live: dict[int, tuple[int, Any]] = {}  # address -> entry, weak reference
        self._events: list[tuple[int, int]] = []  # (entry, +1 allocated or -1 freed)
        self._elsewhere: dict[int, Any] = {}  # address -> storage that is not on this device
        # address -> storage whose memory comes and goes, what it is for, its entry while it has any
        self._followed: dict[int, tuple[Any, str, int | None]] = {}
        self._forward: set[int] | None = None  # entries made since the forward began

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the call, and book what it makes."""
        self._follow()
        result = call(func, args, kwargs)
        for leaf in tree_iter(result):
            if self._counts(leaf):
                self._book(leaf)
        scratch = self.scratch_bytes(func, args)
        if scratch:
            self._events.append((self._enter(scratch), -1))
        return result

    def scratch_bytes(self, func: Any, args: tuple[Any, ...]) -> int:
        """What the kernel of an operator allocates within itself, and frees before it returns."""
        return 0

    def mark(self, tensors: Iterable[Tensor | None], category: str) -> None:
        """Say what the storages of some tensors are for, booking them if they are new."""
        for tensor in tensors:
            if self._counts(tensor):
                self._categories.setdefault(self._book(tensor), category)

    def follow(self, buffers: Iterable[Tensor], elsewhere: Iterable[Tensor], category: str) -> None:
        """Book what buffers have of memory at each moment, by the size of their storage.

        Args:
            buffers: storages that are resized while they live.
            elsewhere: tensors of another device, which are not booked.
            category: what the buffers are for.
        """
        for tensor in elsewhere:
            storage = tensor.untyped_storage()
            self._elsewhere[storage._cdata] = storage
        for tensor in buffers:
            storage = tensor.untyped_storage()
            self._followed[storage._cdata] = storage, category, None
        self._follow()

    def begin_forward(self) -> None:
        """From here on, what stays alive until `end_forward` is an activation."""
        self._forward = set()

    def end_forward(self) -> None:
        """Book as activations all that the forward made and that is still alive."""
        alive = {entry for entry, _ in self._live.values()}
        for entry in alive & (self._forward or set()):
            self._categories.setdefault(entry, "activations")
        self._forward = None

    def bytes_alive(self) -> dict[str, int]:
        """Bytes by category at this moment."""
        self._follow()
        return self._at(len(self._events))

    def moment(self) -> int:
        """Now, for `peak_of_step` to begin at."""
        self._follow()
        return len(self._events)

    def curve(self, since: int) -> list[int]:
        """All bytes alive at the moment `since`, and after each event from then on."""
        changes = [sign * self._sizes[entry] for entry, sign in self._events[since:]]
        return list(itertools.accumulate(changes, initial=sum(self._at(since).values())))

    def peak(self) -> dict[str, int]:
        """Bytes by category at the first moment when most bytes were alive."""
        return self._highest(dict.fromkeys(CATEGORIES, 0), self._events)

    def peak_of_step(self, since: int) -> dict[str, int]:
        """The same, from the moment `since` on, of a step in the midst of training.

        What the step leaves behind, as the optimizer's state, was there before a later one: it
        counts as if it had been there from `since` on. Gradients do not, as they are dropped. What
        was before `since` is not gone through again, as one ledger books many steps.
        """
        self._follow()
        left = self._alive()
        left -= {entry for entry in left if self._categories.get(entry) == "gradients"}
        after = self._events[since:]
        lasting = [(entry, +1) for entry, _ in after if entry in left]
        passing = [event for event in after if event[0] not in left]
        return self._highest(self._at(since), [*lasting, *passing])

    def _highest(self, before: dict[str, int], events: list[tuple[int, int]]) -> dict[str, int]:
        """Bytes by category after that of the events at which most are alive; none without any."""
        live, highest, at = sum(before.values()), 0, 0
        for position, (entry, sign) in enumerate(events, 1):
            live += sign * self._sizes[entry]
            if live > highest:
                highest, at = live, position
        totals = before if at else dict.fromkeys(CATEGORIES, 0)
        return self._changed(totals, events[:at], +1)

    def _at(self, moment: int) -> dict[str, int]:
        """Bytes by category at a moment: what is alive now, less what has come since."""
        now = [(entry, +1) for entry in self._alive()]
        totals = self._changed(dict.fromkeys(CATEGORIES, 0), now, +1)
        return self._changed(totals, self._events[moment:], -1)

    def _alive(self) -> set[int]:
        """The entries of what is booked and not struck off."""
        followed = {entry for _, _, entry in self._followed.values() if entry is not None}
        return followed | {entry for entry, _ in self._live.values()}

    def _changed(
        self, totals: dict[str, int], events: list[tuple[int, int]], factor: int
    ) -> dict[str, int]:
        totals = dict(totals)
        for entry, sign in events:
            category = self._categories.get(entry, "temporary")
            totals[category] += factor * sign * self._sizes[entry]
        return totals

    def _follow(self) -> None:
        for address, (storage, category, entry) in self._followed.items():
            n_bytes = storage.nbytes()
            if entry is not None and n_bytes == 0:
                self._events.append((entry, -1))
                self._followed[address] = storage, category, None
            elif entry is None and n_bytes > 0:
                entry = self._enter(n_bytes)
                self._categories[entry] = category
                self._followed[address] = storage, category, entry

    def _counts(self, value: Any) -> TypeGuard[Tensor]:
        # a sparse tensor has no storage: its indices and values are tensors of their own
        if not isinstance(value, self._counted) or value.layout != torch.strided:
            return False
        address = value.untyped_storage()._cdata
        return address not in self._elsewhere and address not in self._followed

    def _enter(self, n_bytes: int) -> int:
        self._sizes.append(-(-n_bytes // self.BLOCK_BYTES) * self.BLOCK_BYTES)
        entry = len(self._sizes) - 1
        self._events.append((entry, +1))
        return entry

    def _book(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        # not data_ptr: a storage of a fake tensor has no data
        address = storage._cdata
        known = self._live.get(address)
        if known is not None and known[1]() is storage:
            return known[0]
        entry = self._enter(storage.nbytes())
        if self._forward is not None:
            self._forward.add(entry)

        def strike_off(_: Any) -> None:
            self._events.append((entry, -1))
            if self._live.get(address, (None,))[0] == entry:
                del self._live[address]

        self._live[address] = (entry, weakref.ref(storage, strike_off))
        return entry


class AnyValue(CallMode):
    """Answers 1 to who asks for the value of a fake tensor, as optimizers ask for their step."""

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the call, unless it asks for a value."""
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1
        return func(*args, **kwargs)
