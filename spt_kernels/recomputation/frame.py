"""`Frame`: one forward of a region, which saves little and is computed again in the backward."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten

from ..layers.recording import Recording, unpack
from .conditions import Conditions
from .packed import Elsewhere, Entry, Geometry, Given, Kept, Slot, View
from .random_state import RandomState, is_capturing

# A tensor saved last that is no larger than this share of the region's input is kept: without it,
# what has made it, as the last product under a LoRA's bottleneck, need not be computed again
_SMALL = 1 / 32

Hooks = Any  # of saved tensors: what packs, and what unpacks


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
        norm: the norm that has made one of the arguments, what it was called with and its result.
        until_attention: keep what `F.scaled_dot_product_attention` gives and all that comes later.
        whose: tells the frames of one model from those of another.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        norm: tuple[nn.Module, Tensor, Tensor] | None = None,
        until_attention: bool = False,
        whose: object = None,
    ) -> None:
        self.name, self.module, self.whose = name, module, whose
        self._until_attention = until_attention
        self._outer: Hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        leaves, self._structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        modules = (module,) if norm is None else (module, norm[0])
        self.conditions = Conditions(name, modules, self.device)
        self._size = max((t.nbytes for t in tensors), default=0)
        self._entry: Entry | None = None
        self._entry_version = 0
        self._entry_storage: Any = None
        self._call = self._remember(leaves, norm)
        # by address, what is not to be saved again
        self._known = {t.untyped_storage()._cdata for t in self.conditions.parameters}
        self._given = [(t, t._version) for t in tensors if norm is None or t is not norm[2]]
        self._known |= {t.untyped_storage()._cdata for t, _ in self._given}
        is_drawn = not any(isinstance(t, FakeTensor) for t in tensors)
        is_drawn = is_drawn and not is_capturing(self.device)
        self._random = RandomState(self.device) if is_drawn else None
        self._slots: list[weakref.ref[Slot] | None] = []  # by call of `pack`; None was kept
        self._places: list[tuple[int, int]] = []  # likewise, storage and offset
        self._by_storage: dict[int, tuple[weakref.ref[Any], int, Slot]] = {}
        self._notes: list[Any] = []
        self._has_drawn: list[bool] = []
        self._is_over = False

    def _remember(
        self, leaves: list[Any], norm: tuple[nn.Module, Tensor, Tensor] | None
    ) -> list[Any]:
        """The leaves of the arguments, tensors so that a graph of its own may begin at them."""
        held: dict[int, Any] = {}
        if norm is not None:
            module, x, result = norm
            given = Given(x, self.name, self._outer)
            entry = Entry(module, given, result.requires_grad, self.conditions)
            held[id(result)] = entry
            if self._outer is None:  # other hooks may let what they keep be read but once
                self._entry, self._entry_version = entry, result._version
                self._entry_storage = result.untyped_storage()
        for leaf in leaves:
            if isinstance(leaf, Tensor) and id(leaf) not in held:
                held[id(leaf)] = Given(leaf, self.name, self._outer)
        return [held[id(leaf)] if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    # ---- the forward

    def pack(self, tensor: Tensor) -> Any:
        """What the graph holds for a tensor that is saved in the forward."""
        tensor = _alone(tensor)
        storage, geometry = tensor.untyped_storage(), Geometry.of(tensor)
        address, version = storage._cdata, tensor._version
        self._places.append((address, geometry.offset))
        self._slots.append(None)
        if address in self._known:
            return (
                Kept(tensor, self.name) if self._outer is None else Elsewhere(tensor, self._outer)
            )
        if storage is self._entry_storage and version == self._entry_version:
            assert self._entry is not None
            return View(self._entry, geometry)
        same = self._saved_in(storage, version)
        if same is not None and same.geometry.dtype is geometry.dtype:
            return View(same, geometry)
        is_pending = self._until_attention or tensor.nbytes <= self._size * _SMALL
        slot = Slot(self.compute_again, geometry, tensor if is_pending else None)
        self._slots[-1] = weakref.ref(slot)
        self._by_storage[address] = weakref.ref(storage), version, slot
        return slot

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

    def begin(self) -> None:
        """From here on, what this thread saves goes through this frame."""
        torch._C._autograd._push_saved_tensors_default_hooks(self.pack, unpack)

    def abandon(self) -> None:
        """The forward has failed: put things back as they were."""
        torch._C._autograd._pop_saved_tensors_default_hooks()
        self._by_storage.clear()
        self._given.clear()
        self._entry_storage = None

    def end(self, output: Any) -> None:
        """The forward is over: settle what is made again.

        Raises:
            RuntimeError: the region cannot be computed again, or the attention that it was to be
                computed again up to is not there.
        """
        given = list(self._given)
        self.abandon()
        if any(t._version != version for t, version in given):
            raise RuntimeError(
                f"{self.name} changes its input in place and cannot be computed again; leave this "
                "block out of spt.recompute"
            )
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
        self.conditions.settle()
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
        node = _attention_of(output)
        if node is None:
            raise RuntimeError(
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
        self.conditions.check()
        replay = Replay(self.name, self.module, self._slots, self._notes)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self.conditions.again())
            if self._random is not None:
                stack.enter_context(self._random.again())
            leaves = {id(each): each.leaf() for each in self._call if isinstance(each, _REMEMBERED)}
            call = [leaves.get(id(each), each) for each in self._call]
            args, kwargs = tree_unflatten(call, self._structure)
            replay.run(args, kwargs)


class Replay(Recording):
    """A call of a module that is made for what it saves alone, and ends once that is all there.

    Args:
        name: of the region, for messages.
        module: to call.
        slots: to fill, by what is saved; None is kept already.
        notes: what layers chose in the forward.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        slots: list[weakref.ref[Slot] | None],
        notes: list[Any],
    ) -> None:
        self.module = module
        self._name, self._slots, self._notes = name, slots, iter(notes)
        self._n_saved = 0

    def run(self, args: Any, kwargs: Any) -> None:
        """Call the module; errors are those of `Frame.compute_again`."""
        torch._C._autograd._push_saved_tensors_default_hooks(self.pack, unpack)
        try:
            self.module(*args, **kwargs)
        except _AllThere:
            return
        finally:
            torch._C._autograd._pop_saved_tensors_default_hooks()
        raise RuntimeError(_differs(self._name))

    def pack(self, tensor: Tensor) -> Kept:
        """Fill the slot of the tensor that is saved; raises `_AllThere` with the last one."""
        tensor = _alone(tensor)
        ref = self._slots[self._n_saved]
        self._n_saved += 1
        slot = None if ref is None else ref()
        if slot is not None:
            if slot.geometry != Geometry.of(tensor):
                raise RuntimeError(_differs(self._name))
            slot.fill(tensor)
        if self._n_saved == len(self._slots):
            raise _AllThere
        return Kept(tensor, self._name)

    def recall(self) -> Any:
        """What the layer chose in the forward."""
        return next(self._notes, None)


class _AllThere(Exception):
    """Ends a replay."""


def _alone(tensor: Tensor) -> Tensor:
    """A tensor without the graph that it comes from, which holds on to what is packed."""
    return tensor.detach() if tensor.requires_grad else tensor


_REMEMBERED = (Given, Entry)


def _differs(name: str) -> str:
    return (
        f"{name} saved other tensors when it was computed again than in its forward: it depends on "
        "something besides its arguments, parameters and torch's random numbers; leave this block "
        "out of spt.recompute"
    )


def _without_small_ones(slots: list[Slot | None]) -> int:
    """How many to make again, if small tensors at the end, which are still there, are kept."""
    count = len(slots)
    while count and (slots[count - 1] is None or slots[count - 1].tensor is not None):  # type: ignore[union-attr]
        count -= 1
    return count


def _attention_of(output: Any) -> Any:
    """The last node of a fused attention that an output comes from, within a few steps."""
    pending: Iterator[Any] = (t.grad_fn for t in tree_iter(output) if isinstance(t, Tensor))
    seen, level = set(), [node for node in pending if node is not None]
    for _ in range(_STEPS_FROM_ATTENTION):
        found = [node for node in level if hasattr(node, "_raw_saved_query")]
        if found:
            return found[0]
        seen.update(level)
        level = list(
            dict.fromkeys(
                below
                for node in level
                for below, _ in node.next_functions
                if below is not None and below not in seen
            )
        )
    return None


_STEPS_FROM_ATTENTION = 24  # reshapes, a norm, gates, a product, an Adapter, dropout
