"""Sparse AdamW in C++: once, or planned for many steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import DTYPE_NUMBERS, check, check_target
from .module import module


def sparse_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    targets: Sequence[Tensor],
    indices: Sequence[Tensor],
    originals: Sequence[Tensor],
    hyper: Tensor,
    stochastic_rounding: bool,
    seed: int,
) -> None:
    """See `spt_kernels.ops.sparse_adamw`; params, states and targets are mutated.

    Args:
        params: fp32, contiguous, any shape.
        grads: fp32, like `params`.
        exp_avgs: fp32, like `params`.
        exp_avg_sqs: fp32, like `params`.
        targets: the weights that hold base + delta; 0 elements for a parameter without one.
        indices: int32 `[nnz]`; 0 elements without a target.
        originals: `[nnz]` in the target's dtype; 0 elements without a target.
        hyper: fp64 `[entries, 8]`: lr, beta1, beta2, eps, weight_decay, step (1 for the first, 0
            skips the entry), maximize, entry_id.
        stochastic_rounding: for bf16 and fp16 targets.
        seed: of that; its low 32 bits are used.

    Raises:
        ValueError: a layout, dtype or length does not fit, or a position is out of range. Nothing
            has been written then.
    """
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        check(f"grads[{i}]", grad, (torch.float32,), param.numel())
    check("hyper", hyper, (torch.float64,), 8 * len(params))
    entry_ids = [int(entry_id) for entry_id in hyper[:, 7].tolist()] if len(params) else []
    module().sparse_adamw(
        *_entries((params, exp_avgs, exp_avg_sqs, targets, indices, originals), entry_ids),
        [t.data_ptr() for t in grads],
        hyper.data_ptr(),
        stochastic_rounding,
        seed & 0xFFFFFFFF,
        torch.get_num_threads(),
    )


class AdamWPlan:
    """The entries of `sparse_adamw` kept from step to step, so that a step hands over little.

    It holds addresses, not tensors: whoever has it holds these, and compares `data_ptr()`s before
    each step. What it is made of is checked; `step` trusts its caller.

    Args:
        params: see `sparse_adamw`, like all but the last two.
        exp_avgs: likewise.
        exp_avg_sqs: likewise.
        targets: likewise.
        indices: likewise.
        originals: likewise.
        entry_ids: likewise, the last column of `hyper`.
        steps: fp32 scalars, which `step` advances by 1.
        groups: for each entry, the row of `numbers` that it takes.

    Raises:
        ValueError: a layout, dtype or length does not fit, or a position is out of range.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        targets: Sequence[Tensor],
        indices: Sequence[Tensor],
        originals: Sequence[Tensor],
        entry_ids: Sequence[int],
        *,
        steps: Sequence[Tensor],
        groups: Sequence[int],
    ) -> None:
        for i, step in enumerate(steps):
            check(f"steps[{i}]", step, (torch.float32,), 1)
        self._plan = module().AdamWPlan(
            *_entries((params, exp_avgs, exp_avg_sqs, targets, indices, originals), entry_ids),
            [t.data_ptr() for t in steps],
            list(groups),
        )

    def step(
        self,
        grads: Sequence[int],
        numbers: Sequence[tuple[float, ...]],
        stochastic_rounding: bool,
        seed: int,
    ) -> None:
        """Take a step; of the gradients nothing is checked.

        Args:
            grads: addresses of the gradients, fp32, contiguous, as long as their parameters.
            numbers: for each group lr, beta1, beta2, eps, weight_decay and maximize.
            stochastic_rounding: for bf16 and fp16 targets.
            seed: of that; its low 32 bits are used.

        Raises:
            ValueError: a position has come to lie out of range since the plan was made. Nothing has
                been written outside a target, but some entries may be a step ahead of others.
        """
        threads = torch.get_num_threads()
        self._plan.step(grads, numbers, stochastic_rounding, seed & 0xFFFFFFFF, threads)


def _entries(
    columns: Sequence[Sequence[Tensor]], entry_ids: Sequence[int]
) -> tuple[list[list[int]], list[int], list[int], list[int], list[int]]:
    """What the C++ is told of params, exp_avgs, exp_avg_sqs, targets, indices and originals."""
    for i, row in enumerate(zip(*columns, strict=True)):
        n = row[0].numel()
        for name, tensor in zip(("params", "exp_avgs", "exp_avg_sqs"), row, strict=False):
            check(f"{name}[{i}]", tensor, (torch.float32,), n)
        if row[3].numel() > 0:
            check_target(i, row[3], row[4], row[5], n)
    params, targets = columns[0], columns[3]
    return (
        [[t.data_ptr() for t in column] for column in columns],
        [t.numel() for t in params],
        [DTYPE_NUMBERS.get(t.dtype, 0) for t in targets],
        [t.numel() for t in targets],
        [entry_id & 0xFFFFFFFF for entry_id in entry_ids],
    )
