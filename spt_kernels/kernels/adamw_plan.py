"""Sparse AdamW planned for many steps: what stays is on the device, and a step is two launches."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .address_table import SmallTable, upload
from .prepared_launch import prepared_launch
from .sparse_adamw import BLOCK, WARPS, entry_table, sparse_adamw_kernel
from .variant import Variant

_ENTRIES = 32 * WARPS  # that one program counts: a thread each, or one would be counted twice


@triton.jit(do_not_specialize=["counters", "changing", "numbers", "n_entries", "found_inf"])
def adamw_numbers_kernel(
    counters: tl.int64,
    changing: tl.int64,
    numbers: tl.int64,
    n_entries,
    found_inf: tl.int64,
    BLOCK: tl.constexpr,
):
    """Count the step of each entry, and compute what its values are then multiplied with.

    The powers of a step are in double precision, once per entry rather than once per thread.
    """
    # each address is made 64 bits wide first: the interpreter takes one that lies low for 32
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = entry < n_entries
    counter_ptr = counters.to(tl.int64).to(tl.pointer_type(tl.int64)) + entry * 3
    step_ptr = tl.load(counter_ptr, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    group = tl.load(counter_ptr + 1, mask=mask, other=0)
    entry_id = tl.load(counter_ptr + 2, mask=mask, other=0)

    counted = 1.0
    if found_inf != 0:
        found = tl.load(found_inf.to(tl.int64).to(tl.pointer_type(tl.float32)))
        counted = tl.where(found == 0.0, 1.0, 0.0)
    steps = tl.load(step_ptr, mask=mask, other=0.0) + counted
    tl.store(step_ptr, steps, mask=mask)

    groups = changing.to(tl.int64) + 8 * n_entries  # 8 words each: six numbers, two addresses
    group_ptr = groups.to(tl.pointer_type(tl.float64)) + group * 8
    beta1 = tl.load(group_ptr + 1, mask=mask, other=0.5)
    beta2 = tl.load(group_ptr + 2, mask=mask, other=0.5)
    eps = tl.load(group_ptr + 3, mask=mask, other=0.0)
    weight_decay = tl.load(group_ptr + 4, mask=mask, other=0.0)
    maximize = tl.load(group_ptr + 5, mask=mask, other=0.0)
    lr = tl.load(group_ptr, mask=mask, other=0.0)
    # or it is a scalar on the device, fp32 or fp64, which may change while the addresses stay
    lr_ptr = groups.to(tl.pointer_type(tl.int64)) + group * 8 + 6
    narrow = tl.load(lr_ptr, mask=mask, other=0)
    wide = tl.load(lr_ptr + 1, mask=mask, other=0)
    is_narrow, is_wide = mask & (narrow != 0), mask & (wide != 0)
    narrow_ptr = narrow.to(tl.pointer_type(tl.float32))
    wide_ptr = wide.to(tl.pointer_type(tl.float64))
    lr = tl.where(is_narrow, tl.load(narrow_ptr, mask=is_narrow, other=0.0).to(tl.float64), lr)
    lr = tl.where(is_wide, tl.load(wide_ptr, mask=is_wide, other=0.0), lr)

    t = tl.maximum(steps, 1.0).to(tl.float64)  # an entry that has never been updated is skipped
    number_ptr = numbers.to(tl.int64).to(tl.pointer_type(tl.float64)) + entry * 10
    tl.store(number_ptr + 0, 1.0 - 2.0 * maximize, mask=mask)
    tl.store(number_ptr + 1, 1.0 - lr * weight_decay, mask=mask)
    tl.store(number_ptr + 2, 1.0 - beta1, mask=mask)
    tl.store(number_ptr + 3, beta2, mask=mask)
    tl.store(number_ptr + 4, 1.0 - beta2, mask=mask)
    tl.store(number_ptr + 5, tl.sqrt(1.0 - tl.exp(t * tl.log(beta2))), mask=mask)
    tl.store(number_ptr + 6, eps, mask=mask)
    tl.store(number_ptr + 7, -lr / (1.0 - tl.exp(t * tl.log(beta1))), mask=mask)
    tl.store(number_ptr + 8, steps.to(tl.float64) * counted, mask=mask)
    tl.store(number_ptr + 9, entry_id.to(tl.float64), mask=mask)


class AdamWPlan:
    """The entries of `sparse_adamw` kept on the device, so that a step hands over what changed.

    It holds addresses, not tensors: whoever has it compares `data_ptr()`s before each step. All
    tensors are on the current device.

    Args:
        params: fp32, contiguous; see `spt_kernels.ops.sparse_adamw`, like the next five.
        exp_avgs: likewise.
        exp_avg_sqs: likewise.
        targets: likewise; 0 elements for a parameter without one.
        indices: likewise.
        originals: likewise.
        entry_ids: which stream of random bits each entry rounds with.
        steps: fp32 scalars on the device, which `step` advances by 1.
        groups: for each entry, the row of `numbers` that it takes.
        n_groups: rows of `numbers`.
        stochastic_rounding: for bf16 and fp16 targets.
        seed: of that; its low 32 bits are used.
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
        n_groups: int,
        stochastic_rounding: bool,
        seed: int,
    ) -> None:
        device, n = params[0].device, len(params)
        table, n_programs = entry_table(params, exp_avgs, exp_avg_sqs, targets, indices, originals)
        counters = torch.tensor(
            [[s.data_ptr(), *row] for s, *row in zip(steps, groups, entry_ids, strict=True)],
            device="cpu",
        )  # [entries, 3]
        self._table, self._counters = (upload(t, device) for t in (table, counters))
        # [entries, 10], made anew by the first launch of each step for the second
        self._numbers = torch.empty(n, 10, dtype=torch.float64, device=device)
        self._changing = SmallTable(n + 8 * n_groups, device)
        self._n, self._rounding = n, (seed & 0xFFFFFFFF, stochastic_rounding)
        self._launches = (
            prepared_launch(
                adamw_numbers_kernel, -(-n // _ENTRIES), *[0] * 3, n, 0, _ENTRIES, num_warps=WARPS
            ),
            prepared_launch(
                *(sparse_adamw_kernel, max(1, n_programs), *[0] * 3),
                *(n, 0, 0, stochastic_rounding, BLOCK),
                num_warps=WARPS,
            ),
        )

    def step(
        self,
        grads: Sequence[int],
        numbers: Sequence[tuple[float, ...]],
        lrs: Sequence[Tensor | None],
        *,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Take a step, without waiting for the device.

        Args:
            grads: addresses of the gradients, fp32, contiguous, as long as their parameters;
                divided by `grad_scale` in place if that is given.
            numbers: for each group lr, beta1, beta2, eps, weight_decay and maximize.
            lrs: for each group a scalar on the device to read as lr instead, fp32 or fp64.
            grad_scale: fp32 scalar on the device.
            found_inf: fp32 scalar on the device: unless it is 0, nothing changes.
        """
        words = list(grads)
        for row, lr in zip(numbers, lrs, strict=True):
            words += memoryview(array("d", row)).cast("B").cast("q")
            address = 0 if lr is None else lr.data_ptr()
            is_wide = lr is not None and lr.dtype == torch.float64
            words += (0, address) if is_wide else (address, 0)
        changing = self._changing.on_device(words)  # [entries + 8 groups]
        count, update = self._launches
        count(
            *(self._counters.data_ptr(), changing.data_ptr(), self._numbers.data_ptr()),
            *(self._n, 0 if found_inf is None else found_inf.data_ptr(), _ENTRIES),
        )
        seed, stochastic = self._rounding
        update(
            *(self._table.data_ptr(), changing.data_ptr(), self._numbers.data_ptr()),
            *(self._n, seed, 0 if grad_scale is None else grad_scale.data_ptr()),
            *(stochastic, BLOCK),
        )


def shipped_variants() -> list[Variant]:
    """The one kernel here; the other launch is `sparse_adamw`'s."""
    constexprs = {"BLOCK": _ENTRIES}
    return [Variant("numbers", adamw_numbers_kernel, {}, constexprs, num_warps=WARPS)]
