"""The short way through an AdamW step, for as long as what the last one found out still holds."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import repeat
from operator import is_, is_not
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import native
from ..layers.sparse_delta import DeltaSlot, delta_of, leave_to_hook, slot_of, storage_of
from .adamw_step import Member, leave

Groups = Sequence[dict[str, Any]]


class PreparedStep:
    """The entries of a step on the CPU as one native plan, and how to tell that it still is theirs.

    Gradients and the numbers of the groups may change from step to step. Anything else that does,
    another parameter with a gradient, state from a state dict, a moved or replaced tensor, is
    found by comparing objects and addresses, and the step then goes the general way once. Weights
    are held weakly between steps: their memory goes with the model, whoever keeps the optimizer.
    """

    def __init__(self, groups: Groups, members: list[Member], slots: list[DeltaSlot | None]):
        """Use `of`, which knows what this can hold."""
        trained = {id(member.param) for member in members}
        self._params: list[list[Tensor]] = [list(group["params"]) for group in groups]
        self._idle = [p for params in self._params for p in params if id(p) not in trained]
        self._entries = [(m.param, slot) for m, slot in zip(members, slots, strict=True)]
        self._sizes = [member.param.numel() for member in members]
        self._written = [
            (member.param, storage_of(member.param), member.delta.written)
            for member in members
            if member.delta is not None
        ]
        self._rounding = _rounding(members[0].group)
        self._trained = [member.param for member in members]
        self._state, of_model = _state_tensors(members), _model_tensors(members)
        self._of_model = [weakref.ref(tensor) for tensor in of_model]
        self._addresses = [
            tensor.data_ptr() for tensor in (*self._trained, *self._state, *of_model)
        ]
        self._plan = _plan(groups, members)

    @classmethod
    def of(cls, groups: Groups, members: list[Member]) -> PreparedStep | None:
        """Prepare the next step of these members; None where it has to go the general way."""
        if not (members and native.available()):
            return None
        if any(_rounding(m.group) != _rounding(members[0].group) for m in members):
            return None
        if not all(member.is_entry and _is_plain(member) for member in members):
            return None
        slots = [None if member.delta is None else slot_of(member.delta) for member in members]
        return cls(groups, members, slots)

    def take(self, optimizer: Optimizer, grad_scale: Tensor | None) -> bool:
        """Take the step; False if it is not what was prepared, and then nothing is done.

        Args:
            optimizer: whose parameters these were.
            grad_scale: what the gradients are to be divided by.
        """
        groups = optimizer.param_groups
        if torch._C._len_torch_dispatch_stack() > 0:
            return False  # a mode wants to see the op
        if not self._has_params(groups):
            return False
        of_model = self._find_tensors(optimizer.state)
        grads = self._grads()
        if of_model is None or grads is None:
            return False
        if grad_scale is not None:
            torch._foreach_div_(grads, grad_scale)
        self._run(groups, grads, of_model)
        for param in self._idle:
            leave(delta_of(param))
        leave_to_hook(optimizer, self._idle)
        return True

    def _has_params(self, groups: Groups) -> bool:
        if len(groups) != len(self._params):
            return False
        for group, params in zip(groups, self._params, strict=True):
            now = group["params"]
            if len(now) != len(params) or not all(map(is_, now, params)):
                return False
            if _rounding(group) != self._rounding:
                return False
        return all(param.grad is None for param in self._idle)

    def _find_tensors(self, states: dict[Tensor, Any]) -> list[Tensor] | None:
        """Target, index and original of each delta; None if these or the state are others now."""
        state: list[Any] = []
        of_model: list[Any] = []
        for param, slot in self._entries:
            own = states.get(param)
            if own is None:
                return None
            state += (own.get("exp_avg"), own.get("exp_avg_sq"), own.get("step"))
            if slot is not None:
                of_model += slot.tensors()
        before = [ref() for ref in self._of_model]
        is_same = (
            len(of_model) == len(before)
            and all(map(is_not, before, repeat(None)))  # what a reference to nothing gives
            and all(map(is_, of_model, before))
            and all(map(is_, state, self._state))
            # the same object may have been given other memory, through `.data` for instance
            and list(map(Tensor.data_ptr, (*self._trained, *state, *of_model))) == self._addresses
        )
        return of_model if is_same else None

    def _grads(self) -> list[Tensor] | None:
        grads = [param.grad for param, _ in self._entries]
        for grad, numel in zip(grads, self._sizes, strict=True):
            if (
                type(grad) is not Tensor
                or grad.dtype is not torch.float32
                or grad.layout is not torch.strided
                or not grad.is_contiguous()
                or grad.is_neg()  # its memory holds the opposite
                or grad.numel() != numel
            ):
                return None
        return grads  # type: ignore[return-value]

    def _run(self, groups: Groups, grads: list[Tensor], of_model: list[Tensor]) -> None:
        numbers = [_numbers(group) for group in groups]
        self._plan.step([grad.data_ptr() for grad in grads], numbers, *self._rounding)
        # what a graph may have saved, which is to be told; nobody differentiates the state
        torch.autograd.graph.increment_version([*self._trained, *of_model[::3]])
        for param, storage, written in self._written:
            written.record_version(param, storage)


def _rounding(group: dict[str, Any]) -> tuple[bool, int]:
    return group["stochastic_rounding"], group["seed"]


def _numbers(group: dict[str, Any]) -> tuple[float, ...]:
    beta1, beta2 = group["betas"]
    return (
        float(group["lr"]),
        float(beta1),
        float(beta2),
        float(group["eps"]),
        float(group["weight_decay"]),
        float(group["maximize"]),
    )


def _state_tensors(members: list[Member]) -> list[Tensor]:
    """What the optimizer has, in the order of `_find_tensors`."""
    return [m.state[name] for m in members for name in ("exp_avg", "exp_avg_sq", "step")]


def _model_tensors(members: list[Member]) -> list[Tensor]:
    """What a step reads and writes of the model beside the parameters: three for each delta."""
    deltas = [member.delta for member in members if member.delta is not None]
    return [tensor for d in deltas for tensor in (d.target, d.index, d.original)]


def _is_plain(member: Member) -> bool:
    """Whether addresses say all about its tensors."""
    step = member.state["step"]
    return (
        all(
            type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu and not tensor.is_inference()
            for tensor in (member.param, *_state_tensors([member]), *_model_tensors([member]))
        )
        and step.dtype == torch.float32
        and step.dim() == 0
    )


def _plan(groups: Groups, members: list[Member]) -> native.AdamWPlan:
    rows = {id(group): n for n, group in enumerate(groups)}
    absent = torch.empty(0)
    no_index = torch.empty(0, dtype=torch.int32)
    deltas = [member.delta for member in members]
    return native.AdamWPlan(
        [member.param.detach() for member in members],
        [member.state["exp_avg"] for member in members],
        [member.state["exp_avg_sq"] for member in members],
        [absent if delta is None else delta.target for delta in deltas],
        [no_index if delta is None else delta.index for delta in deltas],
        [absent if delta is None else delta.original for delta in deltas],
        [member.entry_id for member in members],
        steps=[member.state["step"] for member in members],
        groups=[rows[id(member.group)] for member in members],
    )
