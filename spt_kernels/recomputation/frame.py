"""`Frame`: one forward of a region, which saves little and is computed again in the backward."""

from __future__ import annotations

import contextlib
import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..layers.autograd.recording import Recording, recording_in_use, unpack
from ..layers.running import Running
from ..ops.torch_internals import hooks_in_use, pop_hooks, push_hooks
from .attention import attention_of
from .call import Call, Hooks, NormCall, tensors_in
from .conditions import Conditions, NotRecomputable
from .packed import Elsewhere, Geometry, Kept, Slot, View, alone, has_storage, unobserved
from .random_state import RandomState, is_capturing
from .replay import Replay

# A tensor saved last that is no larger than this share of the region's input is kept: without it,
# what has made it, as the last product under a LoRA's bottleneck, need not be computed again
_SMALL = 1 / 32


class Frame(Recording):
    """Stands for the saved tensors of one call of a module until the backward asks for one.

    What the module saves for its backward goes through `pack` meanwhile. Parameters and the call's
    arguments stay what they are; anything else becomes a slot. The first of these that is read has
    the module called again, up to the last of them, and all are there. They are freed with the
    nodes of the graph that read them, as what is saved without hooks is.

    The idea is that of non-reentrant checkpointing (`torch.utils.checkpoint`), after Chen et al.,
    "Training Deep Nets with Sublinear Memory Cost", 2016.

    Args:
        name: of the region, for messages.
        module: that is being called.
        args: of the call.
        kwargs: of the call.
        made_by: the norm that has made one of the arguments.
        until_attention: keep what `F.scaled_dot_product_attention` gives and all that comes later.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        made_by: NormCall | None = None,
        until_attention: bool = False,
    ) -> None:
        self.name, self.module = name, module
        self._until_attention = until_attention
        self._outer: Hooks = hooks_in_use()
        tensors = tensors_in((*args, *kwargs.values()))
        self.device = _device_of(tensors, module)
        self._size = max((t.nbytes for t in tensors if has_storage(t)), default=0)
        modules = (module,) if made_by is None else (module, made_by.norm)
        self._conditions = Conditions(name, modules, self.device)
        self._call = Call(args, kwargs, made_by, self._conditions, self._outer)
        result = None if made_by is None else made_by.result
        if made_by is not None:  # its input is held in place of its result
            tensors = [made_by.x, *(t for t in tensors if t is not result)]
        self._given = [(t, t._version) for t in tensors]
        self._asks_for_gradient = any(t.requires_grad for t in tensors)
        # other hooks may let what they keep be read but once: then it is a tensor like another
        self._entry = None if result is None or self._outer is not None else result
        self._entry_version = 0 if result is None else result._version
        own = (*self._conditions.parameters, *(t for t, _ in self._given))
        # these need not be saved
        self._known = {t.untyped_storage()._cdata for t in own if has_storage(t)}
        has_values = not any(isinstance(t, FakeTensor) for t in tensors)
        may_draw = has_values and not is_capturing(self.device)
        self._random = RandomState(self.device) if may_draw else None
        self._has_drawn: list[bool] = []
        self._slots: list[weakref.ref[Slot] | None] = []  # by call of `pack`; None was kept
        self._places: list[tuple[int, int]] = []  # likewise, storage and offset
        self._by_storage: dict[int, tuple[weakref.ref[Any], int, Slot]] = {}
        self._notes: list[Any] = []
        self._running: Running | None = None
        self._handled = 0  # which exception was being handled when the forward began
        self._is_over = False

    # ---- the forward

    def pack(self, tensor: Tensor) -> Any:
        """What the graph holds for a tensor that is saved in the forward."""
        with unobserved():
            return self._packed(tensor)

    def _packed(self, tensor: Tensor) -> Any:
        tensor = alone(tensor)
        if not self._slots:  # offloaded weights are fetched after this was made
            self._known |= {p.untyped_storage()._cdata for p in self._conditions.parameters}
        if not has_storage(tensor):  # as the edges that a graph network was given
            self._slots.append(None)
            self._places.append((0, 0))
            return Kept(tensor, self.name)
        storage, geometry = tensor.untyped_storage(), Geometry.of(tensor)
        address, version = storage._cdata, tensor._version
        self._places.append((address, geometry.offset))
        self._slots.append(None)
        if address in self._known:
            if self._outer is None:
                return Kept(tensor, self.name)
            return Elsewhere(tensor, self._outer, is_read_often=True)  # by whom it is rebuilt for
        if not self.is_running():
            drop_interrupted()
            return Kept(tensor, self.name)
        if self._is_entry(storage, version):
            assert self._call.entry is not None
            return View(self._call.entry, geometry)
        same = self._saved_in(storage, version)
        if same is not None and same.geometry.dtype is geometry.dtype:
            return View(same, geometry)
        is_pending = self._until_attention or tensor.nbytes <= self._size * _SMALL
        slot = Slot(self.compute_again, geometry, tensor if is_pending else None)
        self._slots[-1] = weakref.ref(slot)
        self._by_storage[address] = weakref.ref(storage), version, slot
        return slot

    def _is_entry(self, storage: Any, version: int) -> bool:
        """Whether this is what a norm gave to the region, which it can be asked for again."""
        entry = self._entry
        return (
            entry is not None
            and entry.untyped_storage() is storage
            and version == self._entry_version
        )

    def _saved_in(self, storage: Any, version: int) -> Slot | None:
        """The slot of something that was saved in this storage, if it is the same one still."""
        found = self._by_storage.get(storage._cdata)
        if found is None or found[0]() is not storage or found[1] != version:
            return None
        return found[2]

    def note(self, value: Any) -> None:
        """Remember what a layer chose."""
        self._notes.append(value)

    def holds(self, x: Tensor) -> bool:
        """Whether something that shares the storage of `x` was saved here, so that `x` is free."""
        return self._saved_in(x.untyped_storage(), x._version) is not None

    def begin(self, running: Running) -> None:
        """From here on, what this thread saves goes through this frame."""
        self._running, self._handled = running, id(sys.exc_info()[1])
        push_hooks(self.pack, unpack)

    def abandon(self) -> None:
        """The forward has failed: put things back as they were."""
        pop_hooks()
        self._by_storage.clear()
        self._given.clear()
        self._entry = self._running = None

    def has_failed(self) -> bool:
        """In a hook behind the forward, whether an exception has ended it."""
        return id(sys.exc_info()[1]) != self._handled

    def is_running(self) -> bool:
        """Whether the forward is."""
        return self._running is not None and not self._running.is_over()

    def end(self, output: Any) -> None:
        """The forward is over: settle what is made again.

        Raises:
            NotRecomputable: the region cannot be computed again, or the attention that it was to be
                computed again up to is not there.
        """
        given = list(self._given)
        self.abandon()
        if any(t._version != version for t, version in given):
            raise NotRecomputable(
                f"{self.name} changes its input in place and cannot be computed again; leave this "
                "block out of spt.recompute"
            )
        self._call.check_objects()
        slots = [None if ref is None else ref() for ref in self._slots]
        last = self._cut(output) if self._until_attention else _without_small_ones(slots)
        for place, slot in enumerate(slots):
            if slot is None or place >= last:
                self._slots[place] = None
            if slot is not None and place >= last:
                slot.stay()
            elif slot is not None:
                slot.tensor = None
        while self._slots and self._slots[-1] is None:
            self._slots.pop()
        self._conditions.settle()
        self._has_drawn = [] if self._random is None else self._random.has_moved()
        if not any(self._has_drawn):
            self._random = None
        self._is_over = True

    def draws_on_device(self) -> bool:
        """Whether the forward has drawn from another generator than the CPU's."""
        return any(self._has_drawn[1:])

    def _cut(self, output: Any) -> int:
        """How many tensors were saved up to the last of the last attention's q, k and v."""
        if not self._slots:
            return 0
        node, has_other = attention_of(output)
        if node is None:
            if not has_other and not self._asks_for_gradient:
                return 0  # no gradient comes to the attention, but to what follows it alone
            raise NotRecomputable(
                f'{self.name}: what="qkv" keeps the result of F.scaled_dot_product_attention, and '
                "this attention computes it in another way, or not by a fused kernel; take "
                '"attention" or "block" for it'
            )
        inputs = {
            (t.untyped_storage()._cdata, t.storage_offset())
            for t in (node._saved_query, node._saved_key, node._saved_value)
        }
        return 1 + max((n for n, place in enumerate(self._places) if place in inputs), default=-1)

    # ---- the backward

    def compute_again(self) -> None:
        """Fill all slots that the graph still holds.

        Raises:
            RuntimeError: something was changed since the forward, or the region computes something
                else the second time.
        """
        if not self._is_over:
            raise RuntimeError(f"{self.name}: its forward has failed, or is not over yet")
        self._conditions.check()
        replay = Replay(self.name, self.module, self._slots, self._notes)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self._conditions.again())
            if self._random is not None:
                stack.enter_context(self._random.again())
            replay.run(*self._call.again())


def drop_interrupted() -> None:
    """Abandon what forwards left in use that Ctrl-C has ended, which passes module hooks by."""
    while isinstance(frame := recording_in_use(), Frame) and not frame.is_running():
        frame.abandon()


def _device_of(tensors: list[Tensor], module: nn.Module) -> torch.device:
    """Where a call computes: an index or a scale beside its features may be on the CPU."""
    some = tensors or module.parameters()
    devices = dict.fromkeys(t.device for t in some)
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def _without_small_ones(slots: list[Slot | None]) -> int:
    """How many to make again, if small tensors at the end, which are still there, are kept."""
    count = len(slots)
    while count and (slots[count - 1] is None or slots[count - 1].tensor is not None):  # type: ignore[union-attr]
        count -= 1
    return count
