"""The general way through one AdamW step: any parameters, found anew, on any device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from ..distributed.sharded import is_sharded, local_part
from ..layers import SparseDelta, delta_of
from ..ops.dtypes import FLOATS
from ..ops.sparse_adamw import AdamWEntry, sparse_adamw


@dataclass(frozen=True)
class Member:
    """A parameter that takes part in this step."""

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    group: dict[str, Any]
    delta: SparseDelta | None
    entry_id: int

    @property
    def written_delta(self) -> SparseDelta | None:
        """The delta whose weight the step writes, which it leaves to others where it is away."""
        return None if self.delta is None or self.delta.is_away else self.delta

    @property
    def is_entry(self) -> bool:
        """Whether the fused op takes it; anything else goes through torch's own AdamW."""
        param, mean, square = self.param, self.state["exp_avg"], self.state["exp_avg_sq"]
        return (
            param.dtype == mean.dtype == square.dtype == torch.float32
            and param.is_contiguous()
            and mean.is_contiguous()
            and square.is_contiguous()
            and param.device.type in ("cpu", "cuda")
            and (self.delta is None or self.delta.target.dtype in FLOATS)
        )


def members_of(optimizer: Optimizer) -> list[Member]:
    """The parameters with a gradient, with their state, which is made where it is missing.

    Raises:
        RuntimeError: a gradient is sparse.
    """
    members = []
    entry_id = -1
    for group in optimizer.param_groups:
        for param in group["params"]:
            entry_id += 1  # also where there is no gradient: a parameter keeps its random bits
            delta = delta_of(param)
            if param.grad is None:
                leave(delta)
                continue
            if param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"SparseAdamW needs dense gradients, got {param.grad.layout} for a "
                    f"parameter of shape {tuple(param.shape)}"
                )
            state = _state_of(param, group, optimizer)
            if delta is not None and delta.is_away and group["stochastic_rounding"]:
                raise ValueError(
                    "stochastic_rounding: expected False for deltas whose weights are offloaded, "
                    "which are rounded to nearest"
                )
            if is_sharded(param):
                members.append(_local_member(param, state, group, delta, entry_id))
            else:
                members.append(Member(param, param.grad, state, group, delta, entry_id))
    return members


def _local_member(
    param: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    delta: SparseDelta | None,
    entry_id: int,
) -> Member:
    """The part of a parameter that FSDP has put here; the hook after the step writes its delta."""
    if delta is not None and group["stochastic_rounding"]:
        raise ValueError(
            "stochastic_rounding: expected False for deltas that are sharded, which are rounded "
            "to nearest"
        )
    own = {name: local_part(value) for name, value in state.items()}
    return Member(local_part(param), local_part(param.grad), own, group, None, entry_id)


def _state_of(param: Tensor, group: dict[str, Any], optimizer: Optimizer) -> dict[str, Tensor]:
    state = optimizer.state[param]
    # as torch's fused AdamW counts them: what is on a card is never waited for
    counted_on = param.device if param.is_cuda or group["capturable"] else torch.device("cpu")
    if state:
        state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(counted_on)
    else:
        state["step"] = torch.zeros((), dtype=torch.float32, device=counted_on)
        state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return state


def leave(delta: SparseDelta | None) -> None:
    """Keep the hook that follows each step from rounding anew what this step does not touch."""
    if delta is not None and delta.is_fresh:
        delta.mark_written()


def unscale(members: Iterable[Member], grad_scale: Tensor | None) -> None:
    """Divide the gradients by what GradScaler has multiplied the loss with."""
    if grad_scale is None:
        return
    for device in dict.fromkeys(member.param.device for member in members):
        grads = [member.grad for member in members if member.param.device == device]
        torch._foreach_div_(grads, grad_scale.to(device, non_blocking=True))


def step_entries(members: list[Member], found_inf: Tensor | None) -> None:
    """One call of the op for each way of rounding, which is one call as a rule."""
    deltas = [delta for member in members if (delta := member.written_delta) is not None]
    # what was not up to date the hook writes, for a step that is skipped does not
    written = deltas if found_inf is None else [delta for delta in deltas if delta.is_fresh]
    for device in dict.fromkeys(member.state["step"].device for member in members):
        steps = [m.state["step"] for m in members if m.state["step"].device == device]
        if found_inf is None:
            torch._foreach_add_(steps, 1)
        else:
            torch._foreach_add_(steps, [_is_finite(found_inf, device)] * len(steps))
    roundings = dict.fromkeys((m.group["stochastic_rounding"], m.group["seed"]) for m in members)
    for stochastic, seed in roundings:
        chosen = [
            m
            for m in members
            if (m.group["stochastic_rounding"], m.group["seed"]) == (stochastic, seed)
        ]
        entries = [_entry(member, found_inf) for member in chosen]
        sparse_adamw(entries, stochastic_rounding=stochastic, seed=seed)
    for delta in written:
        delta.mark_written()


def _is_finite(found_inf: Tensor, device: torch.device) -> Tensor:
    """1 or 0, fp32, without waiting for either; more than one device may have found something."""
    return (found_inf.to(device, non_blocking=True) == 0).float()


def _entry(member: Member, found_inf: Tensor | None) -> AdamWEntry:
    group, delta, step = member.group, member.written_delta, member.state["step"]
    beta1, beta2 = group["betas"]
    if found_inf is not None:
        step = step * _is_finite(found_inf, step.device)  # 0 skips the entry
    param, grad = member.param, member.grad.contiguous()
    mean, square = member.state["exp_avg"], member.state["exp_avg_sq"]
    if delta is not None and delta.whole:  # the op counts the entries of a delta in a row
        param, grad, mean, square = (t.view(-1) for t in (param, grad, mean, square))
    return AdamWEntry(
        param=param,
        grad=grad,
        exp_avg=mean,
        exp_avg_sq=square,
        step=step,
        lr=group["lr"],
        beta1=float(beta1),
        beta2=float(beta2),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        maximize=group["maximize"],
        target=None if delta is None else delta.target,
        index=None if delta is None else delta.index,
        original=None if delta is None else delta.original,
        entry_id=member.entry_id,
    )


def fits_fused(member: Member) -> bool:
    """Whether torch's fused AdamW takes it, which skips an overflow without asking the host."""
    param, state = member.param, member.state
    return (
        param.is_cuda
        and param.is_floating_point()
        and all(
            tensor.dtype == param.dtype and tensor.is_contiguous()
            for tensor in (param, member.grad, state["exp_avg"], state["exp_avg_sq"])
        )
    )


def step_rest(members: list[Member], found_inf: Tensor | None = None) -> None:
    """Torch's own AdamW for what the fused op does not take.

    Args:
        members: of any groups.
        found_inf: unless it is 0, nothing changes; for members that `fits_fused` holds for.
    """
    for group_id, is_fused in dict.fromkeys((id(m.group), fits_fused(m)) for m in members):
        chosen = [m for m in members if (id(m.group), fits_fused(m)) == (group_id, is_fused)]
        group, states = chosen[0].group, [member.state for member in chosen]
        beta1, beta2 = group["betas"]
        adamw(
            [member.param for member in chosen],
            [member.grad for member in chosen],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=is_fused or None,
            found_inf=found_inf,
            capturable=all(state["step"].device.type != "cpu" for state in states),
            has_complex=any(member.param.is_complex() for member in chosen),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
    for member in members:
        if member.delta is not None:
            member.delta.write()
