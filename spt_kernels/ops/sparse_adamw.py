"""Sparse AdamW: one update of many small parameters, together with the write of base + delta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..reference import sparse_adamw as reference
from .launching import mark_mutated, register
from .write_delta import check_target, check_values

# Columns of `hyper`, the fp64 table [entries, 8] in which the numbers reach every backend
HYPER_COLUMNS = ("lr", "beta1", "beta2", "eps", "weight_decay", "step", "maximize", "entry_id")
_LR, _STEP = HYPER_COLUMNS.index("lr"), HYPER_COLUMNS.index("step")

# Entries without a target have tensors of 0 elements for target, index and original.
torch.library.define(
    "spt::sparse_adamw",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] targets, Tensor[] indices, Tensor[] originals, Tensor hyper, "
    "bool stochastic_rounding, int seed) -> ()",
)


@dataclass(frozen=True, eq=False)
class AdamWEntry:
    """One parameter of an update, and the weight it is a delta of, if it is one.

    Attributes:
        param: fp32, contiguous, mutated: a delta `[nnz]`, or without target of any shape.
        grad: fp32, like `param`.
        exp_avg: running mean of the gradient, like `param`, mutated.
        exp_avg_sq: running mean of its square, like `param`, mutated.
        step: scalar fp32 tensor, which update this is, counted from 1; 0 skips the entry. It is
            read, not advanced. On the CPU, or on the parameter's device and then never waited for.
        lr: learning rate, a number or a scalar tensor.
        beta1: decay of `exp_avg`.
        beta2: decay of `exp_avg_sq`.
        eps: added to the denominator.
        weight_decay: decoupled, as in AdamW. On a delta it pulls to the base weights.
        maximize: climb instead of descend.
        target: the weight that holds base + delta, mutated; see `write_delta`.
        index: int32 `[nnz]`, its trained flat positions, unique and in range.
        original: `[nnz]` in the target's dtype, the base values there.
        entry_id: which stream of random bits the entry rounds with; None: its place in the list.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool = False
    target: Tensor | None = None
    index: Tensor | None = None
    original: Tensor | None = None
    entry_id: int | None = None


def sparse_adamw(
    entries: Sequence[AdamWEntry], *, stochastic_rounding: bool = False, seed: int = 0
) -> None:
    """Take one AdamW step on every entry and write the new deltas into their weights.

    The arithmetic is that of `torch.optim.AdamW`, in fp32. One launch (one native call) serves all
    entries of a device.

    Args:
        entries: parameters with their state; mutated as `AdamWEntry` says.
        stochastic_rounding: round base + delta into bf16 and fp16 weights up or down at random,
            without bias, instead of to nearest. The same seed, step and entry give the same bits on
            every backend.
        seed: of that randomness; its low 32 bits are used.

    Raises:
        ValueError: shapes, devices or memory layout do not fit.
        TypeError: a dtype does not fit.
    """
    for n, entry in enumerate(entries):
        _validate(f"entries[{n}]", entry)
    ids = [n if e.entry_id is None else e.entry_id for n, e in enumerate(entries)]
    places = [(e.param.device, e.step.device) for e in entries]
    with torch.no_grad():
        for place in dict.fromkeys(places):
            chosen = [n for n, other in enumerate(places) if other == place]
            some_entries, some_ids = [entries[n] for n in chosen], [ids[n] for n in chosen]
            _update(some_entries, some_ids, place[0], stochastic_rounding, seed)


def plan_on_card(*columns: Any, **how: Any) -> Any:
    """Entries on a card kept from step to step, as `kernels.adamw_plan.AdamWPlan` takes them."""
    from ..kernels.adamw_plan import AdamWPlan

    return AdamWPlan(*columns, **how)


def _update(
    entries: list[AdamWEntry], ids: list[int], device: torch.device, stochastic: bool, seed: int
) -> None:
    absent = torch.empty(0, device=device)
    no_index = torch.empty(0, dtype=torch.int32, device=device)
    torch.ops.spt.sparse_adamw(
        [e.param for e in entries],
        [e.grad for e in entries],
        [e.exp_avg for e in entries],
        [e.exp_avg_sq for e in entries],
        [absent if e.target is None else e.target for e in entries],
        [no_index if e.index is None else e.index for e in entries],
        [absent if e.original is None else e.original for e in entries],
        _hyper(entries, ids, device),
        stochastic,
        seed,
    )


def _hyper(entries: list[AdamWEntry], ids: list[int], device: torch.device) -> Tensor:
    """The table of numbers: on the CPU, or on the device as soon as the steps are counted there."""
    steps = torch.stack([entry.step for entry in entries])  # [entries]
    on_host = steps.device.type == "cpu"
    rows = [
        (
            0.0 if isinstance(e.lr, Tensor) and not on_host else float(e.lr),
            *(e.beta1, e.beta2, e.eps, e.weight_decay, 0.0, float(e.maximize), float(entry_id)),
        )
        for e, entry_id in zip(entries, ids, strict=True)
    ]
    hyper = torch.tensor(rows, dtype=torch.float64, device="cpu")  # [entries, 8]
    if not on_host:
        from ..kernels.address_table import upload

        hyper = upload(hyper, device)
        for n, entry in enumerate(entries):
            if isinstance(entry.lr, Tensor):
                hyper[n, _LR] = entry.lr.to(device, non_blocking=True)
    hyper[:, _STEP] = steps
    return hyper


def _validate(name: str, entry: AdamWEntry) -> None:
    param = entry.param
    for part in ("param", "grad", "exp_avg", "exp_avg_sq"):
        value = getattr(entry, part)
        if value.dtype != torch.float32:
            raise TypeError(f"{name}.{part} must be float32, got {value.dtype}")
        if value.layout != torch.strided or not value.is_contiguous():
            raise ValueError(f"{name}.{part} must be dense and contiguous")
        if value.shape != param.shape or value.device != param.device:
            raise ValueError(
                f"{name}.{part} must be of shape {tuple(param.shape)} on {param.device} like "
                f"param, got {tuple(value.shape)} on {value.device}"
            )
    if entry.step.dim() != 0:
        raise ValueError(f"{name}.step must be a scalar, got shape {tuple(entry.step.shape)}")
    if entry.step.device.type != "cpu" and entry.step.device != param.device:
        raise ValueError(
            f"{name}.step must be on the CPU or on {param.device}, got {entry.step.device}"
        )
    if entry.target is not None and entry.index is not None and entry.original is not None:
        check_target(f"{name}.target", entry.target, entry.index, entry.original)
        check_values(f"{name}.param", param, torch.float32, entry.index)
    elif not (entry.target is None and entry.index is None and entry.original is None):
        raise ValueError(f"{name} must have all of target, index and original, or none of them")


# The kernels get what the schema lists, in its order.
def _cpu(*arguments: Any) -> None:
    backend = native if native.available() else reference
    backend.sparse_adamw(*arguments)
    _mark_mutated(*arguments)


def _cuda(*arguments: Any) -> None:
    from ..kernels import sparse_adamw as kernels

    params = arguments[0]
    with torch.cuda.device_of(params[0]):  # Triton launches on the current device
        kernels.sparse_adamw(*arguments)
    _mark_mutated(*arguments)


def _mark_mutated(*arguments: Any) -> None:
    params, _, exp_avgs, exp_avg_sqs, targets, *_ = arguments
    mark_mutated([*params, *exp_avgs, *exp_avg_sqs, *targets])


register("spt::sparse_adamw", "cpu", _cpu)
register("spt::sparse_adamw", "cuda", _cuda)
torch.library.register_fake("spt::sparse_adamw", lambda *arguments: None)
