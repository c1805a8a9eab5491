"""The short way through an AdamW step, for as long as what the last one found out still holds."""

from __future__ import annotations

import weakref
from dataclasses import replace
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..layers.deltas.sparse_delta import DeltaSlot, delta_of, leave_to_hook, slot_of
from ..layers.deltas.written_state import memory_of
from ..ops.torch_internals import count_dispatch_modes
from .adamw_step import Member, fits_fused, leave, step_rest, unscale
from .planned_entries import Groups, PlannedEntries, plan_entries, rounding

_STATE = itemgetter("exp_avg", "exp_avg_sq", "step")
_LAYOUT = attrgetter("dtype", "layout")
address_of = Tensor.data_ptr
PLAIN = {Tensor, nn.Parameter}  # types whose addresses say all about them


class PreparedStep:
    """A step whose tensors are known, and how to tell that it still is theirs.

    Gradients and the numbers of the groups may change from step to step. Anything else that does,
    another parameter with a gradient, state from a state dict, a moved or replaced tensor, is
    found by comparing objects and addresses, and the step then goes the general way once. Weights
    are held weakly between steps: their memory goes with the model, whoever keeps the optimizer.
    """

    def __init__(
        self,
        groups: Groups,
        entries: list[Member],
        rest: list[Member],
        slots: list[DeltaSlot],
        planned: PlannedEntries,
    ):
        """Use `of`, which knows what this can hold."""
        members = [*entries, *rest]
        trained = {id(member.param) for member in members}
        self._groups = list(groups)  # whose numbers the rest is stepped by
        self._params: list[list[Tensor]] = [list(group["params"]) for group in groups]
        self._idle = [p for params in self._params for p in params if id(p) not in trained]
        self._rest, self._slots, self._planned = rest, slots, planned
        self._entries = [member.param for member in entries]
        self._sizes = [param.numel() for param in self._entries]
        self._written = [
            (member.param, memory_of(member.param), delta.written)
            for member in entries
            if (delta := member.written_delta) is not None
        ]
        self._rounding = rounding(entries[0].group)
        self.is_capturable = _is_capturable(groups)
        self.on_card = entries[0].param.is_cuda
        self._trained = [member.param for member in members]
        self._state, of_model = _state_tensors(members), _model_tensors(entries)
        self._ids = list(map(id, (*self._state, *of_model)))
        # references to memory of the model that is no more; those to a tensor itself would keep
        # `torch.utils.swap_tensors` from it
        self._gone: list[object] = []
        storages = [tensor.untyped_storage() for tensor in of_model]
        self._of_model = [weakref.ref(storage, self._gone.append) for storage in storages]
        self._addresses = list(map(address_of, (*self._trained, *self._state, *of_model)))

    @classmethod
    def of(cls, groups: Groups, members: list[Member]) -> PreparedStep | None:
        """Prepare the next step of these members; None where it has to go the general way."""
        entries = [member for member in members if member.is_entry]
        rest = [member for member in members if not member.is_entry]
        if not entries or any(member.delta is not None for member in rest):
            return None
        first = entries[0]
        if any(rounding(member.group) != rounding(first.group) for member in entries):
            return None
        if not all(_is_plain(member, first.param.device) for member in members):
            return None
        slots = [slot_of(member.delta) for member in entries if member.delta is not None]
        planned = plan_entries(groups, entries)
        if planned is None or None in slots:
            return None
        return cls(groups, entries, rest, slots, planned)  # type: ignore[arg-type]

    def take(
        self, optimizer: Optimizer, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> bool:
        """Take the step; False if it is not what was prepared, and then nothing is done.

        Args:
            optimizer: whose parameters these were.
            grad_scale: what the gradients are to be divided by.
            found_inf: not 0 if they overflowed; read on a card if this is on one, else here.
        """
        groups = optimizer.param_groups
        if is_listened_to() or not self._has_params(groups):
            return False
        of_model = self._find_tensors(optimizer.state)
        grads, rest = self._grads(), self._rest_now()
        if of_model is None or grads is None or rest is None:
            return False
        if found_inf is not None and not (self.on_card and all(map(fits_fused, rest))):
            if found_inf.item():
                return False
            found_inf = None
        # what the step that does not happen would not have brought up to date
        stale = [] if found_inf is None else [w for w in self._written if not w[2].matches(w[0])]
        self._planned.step(groups, grads, grad_scale, found_inf)
        # what a graph may have saved, which is to be told; nobody differentiates the state
        torch.autograd.graph.increment_version([*self._trained, *of_model[::3]])
        for param, memory, written in self._written:
            written.record_version(param, memory)
        for _, _, written in stale:
            written.forget()
        unscale(rest, grad_scale)
        step_rest(rest, found_inf)
        for param in self._idle:
            leave(delta_of(param))
        leave_to_hook(optimizer, [*self._idle, *(param for param, _, _ in stale)])
        return True

    def _has_params(self, groups: Groups) -> bool:
        if len(groups) != len(self._params) or not all(map(is_, groups, self._groups)):
            return False
        if _is_capturable(groups) != self.is_capturable:
            return False
        for group, params in zip(groups, self._params, strict=True):
            now = group["params"]
            if len(now) != len(params) or not all(map(is_, now, params)):
                return False
            if rounding(group) != self._rounding:
                return False
        return all(param.grad is None for param in self._idle)

    def _find_tensors(self, states: dict[Tensor, Any]) -> list[Tensor] | None:
        """Target, index and original of each delta; None if these or the state are others now."""
        try:
            parts = map(_STATE, map(states.get, self._trained))  # type: ignore[arg-type]
            state = list(chain.from_iterable(parts))
        except (KeyError, TypeError):  # some of it is gone, or all
            return None
        of_model: list[Any] = [tensor for slot in self._slots for tensor in slot.tensors()]
        is_same = (
            not self._gone  # after which the number of an object may be another's
            and list(map(id, (*state, *of_model))) == self._ids
            # the same object may have been given other memory, through `.data` for instance
            and list(map(address_of, (*self._trained, *state, *of_model))) == self._addresses
        )
        return of_model if is_same else None

    def _grads(self) -> list[Tensor] | None:
        """The gradients of the entries; None if one is not what its address would say."""
        grads: list[Any] = [param.grad for param in self._entries]
        is_plain = (
            PLAIN.issuperset(map(type, grads))
            and set(map(_LAYOUT, grads)) == {(torch.float32, torch.strided)}
            and all(map(Tensor.is_contiguous, grads))
            and not any(map(Tensor.is_neg, grads))  # whose memory holds the opposite
            and list(map(Tensor.numel, grads)) == self._sizes
        )
        return grads if is_plain else None

    def _rest_now(self) -> list[Member] | None:
        """The others with their gradients."""
        grads = [member.param.grad for member in self._rest]
        if any(grad is None or grad.layout is not torch.strided for grad in grads):
            return None
        return [replace(m, grad=grad) for m, grad in zip(self._rest, grads, strict=True)]  # type: ignore[arg-type]


def is_listened_to() -> bool:
    """Whether a mode wants to see the op."""
    return count_dispatch_modes() > 0


def _is_capturable(groups: Groups) -> bool:
    return all(group["capturable"] for group in groups)


def _state_tensors(members: list[Member]) -> list[Tensor]:
    """What the optimizer has, in the order of `_find_tensors`."""
    return [tensor for member in members for tensor in _STATE(member.state)]


def _model_tensors(members: list[Member]) -> list[Tensor]:
    """What a step reads and writes of the model beside the parameters: three for each delta."""
    deltas = [member.delta for member in members if member.delta is not None]
    return [tensor for d in deltas for tensor in (d.target, d.index, d.original)]


def _is_plain(member: Member, device: torch.device) -> bool:
    """Whether addresses say all about its tensors."""
    step, delta = member.state["step"], member.delta
    away = delta.target if delta is not None and delta.is_away else None  # on the host at times
    return (
        all(
            type(tensor) in PLAIN
            and (tensor.device == device or tensor is away)
            and not tensor.is_inference()
            for tensor in (member.param, *_state_tensors([member]), *_model_tensors([member]))
        )
        and step.dtype == torch.float32
        and step.dim() == 0
    )
