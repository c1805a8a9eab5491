"""The entries of a step planned for many steps: one native call on a CPU, two launches on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.launching import on_card
from ..ops.native_calls import AdamWPlan, available
from ..ops.sparse_adamw import plan_on_card
from .adamw_step import Member

Groups = Sequence[dict[str, Any]]


class PlannedEntries(Protocol):
    """Entries whose tensors, but for the gradients, stay where they were."""

    def step(
        self,
        groups: Groups,
        grads: list[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Update all entries.

        Args:
            groups: of the optimizer, with the numbers as they are now.
            grads: fp32, contiguous, one for each entry.
            grad_scale: what they are to be divided by, in place; None: nothing.
            found_inf: unless it is 0, nothing changes; None: 0. On a card alone, which does not
                wait for it: on a CPU `PreparedStep` has read it, and it is None.
        """
        ...


def plan_entries(groups: Groups, members: list[Member]) -> PlannedEntries | None:
    """A plan of members that are all entries, on one device and rounded alike; None: there is none.

    Args:
        groups: of the optimizer.
        members: at least one.
    """
    if members[0].param.device.type == "cuda":
        return _OnCuda(groups, members)
    return _OnCpu(groups, members) if available() else None


def rounding(group: dict[str, Any]) -> tuple[bool, int]:
    """Whether a group is rounded stochastically, and by which seed."""
    return group["stochastic_rounding"], group["seed"]


class _OnCpu:
    def __init__(self, groups: Groups, members: list[Member]) -> None:
        self._rounding = rounding(members[0].group)
        self._plan = AdamWPlan(*_columns(members), **_counters(groups, members))

    def step(
        self,
        groups: Groups,
        grads: list[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        assert found_inf is None  # whoever has one here has read it, and takes no step after it
        if grad_scale is not None:
            torch._foreach_div_(grads, grad_scale)
        numbers = [_numbers(group, float(group["lr"])) for group in groups]
        self._plan.step([grad.data_ptr() for grad in grads], numbers, *self._rounding)


class _OnCuda:
    def __init__(self, groups: Groups, members: list[Member]) -> None:
        self._device = members[0].param.device
        stochastic, seed = rounding(members[0].group)
        with on_card(self._device):
            self._plan = plan_on_card(
                *_columns(members),
                **_counters(groups, members),
                n_groups=len(groups),
                stochastic_rounding=stochastic,
                seed=seed,
            )

    def step(
        self,
        groups: Groups,
        grads: list[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        lrs = [self._lr_on_device(group["lr"]) for group in groups]
        numbers = [
            _numbers(group, float(group["lr"]) if lr is None else 0.0)
            for group, lr in zip(groups, lrs, strict=True)
        ]
        scale, found = self._scalar(grad_scale), self._scalar(found_inf)
        with on_card(self._device):
            addresses = [grad.data_ptr() for grad in grads]
            self._plan.step(addresses, numbers, lrs, grad_scale=scale, found_inf=found)
        if scale is not None:
            torch.autograd.graph.increment_version(grads)

    def _lr_on_device(self, lr: float | Tensor) -> Tensor | None:
        """A learning rate that is on a card, as the kernel reads it; None for a number."""
        if not isinstance(lr, Tensor) or not lr.is_cuda:
            return None
        fits = lr.device == self._device and lr.dtype in (torch.float32, torch.float64)
        return lr if fits else lr.to(self._device, torch.float64, non_blocking=True)

    def _scalar(self, value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(self._device, torch.float32, non_blocking=True)


def _numbers(group: dict[str, Any], lr: float) -> tuple[float, ...]:
    beta1, beta2 = group["betas"]
    return (
        lr,
        float(beta1),
        float(beta2),
        float(group["eps"]),
        float(group["weight_decay"]),
        float(group["maximize"]),
    )


def _columns(members: list[Member]) -> list[list[Any]]:
    """Params, exp_avgs, exp_avg_sqs, targets, indices, originals and entry ids."""
    device = members[0].param.device
    absent = torch.empty(0, device=device)
    no_index = torch.empty(0, dtype=torch.int32, device=device)
    deltas = [member.written_delta for member in members]
    return [
        [member.param.detach() for member in members],
        [member.state["exp_avg"] for member in members],
        [member.state["exp_avg_sq"] for member in members],
        [absent if delta is None else delta.target for delta in deltas],
        [no_index if delta is None else delta.index for delta in deltas],
        [absent if delta is None else delta.original for delta in deltas],
        [member.entry_id for member in members],
    ]


def _counters(groups: Groups, members: list[Member]) -> dict[str, Any]:
    rows = {id(group): n for n, group in enumerate(groups)}
    return {
        "steps": [member.state["step"] for member in members],
        "groups": [rows[id(member.group)] for member in members],
    }
