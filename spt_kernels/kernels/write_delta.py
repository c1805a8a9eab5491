"""Triton kernel that writes base + delta into the trained positions of many weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .address_table import address_table, find_row, upload
from .variant import Variant

# Scattered stores are bound by latency: eight in flight a thread, and enough programs for a card
_BLOCK, _WARPS = 1024, 4

# How a table says which dtype a target has; 0 is no target
TARGET_KIND = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


@triton.jit
def write_block(
    target_address,
    original_address,
    index_ptr,
    delta_ptr,
    offsets,
    mask,
    DTYPE: tl.constexpr,
    RESTORE: tl.constexpr,
):
    """original + delta, or the original's own bits, to target[index] for one block of entries."""
    target_ptr = target_address.to(tl.pointer_type(DTYPE))
    original_ptr = original_address.to(tl.pointer_type(DTYPE))

    position = tl.load(index_ptr + offsets, mask=mask, other=0).to(tl.int64)
    value = tl.load(original_ptr + offsets, mask=mask, other=0.0)
    if not RESTORE:
        value = value.to(tl.float32) + tl.load(delta_ptr + offsets, mask=mask, other=0.0)

    tl.store(target_ptr + position, value.to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def write_delta_kernel(table_ptr, n_rows, RESTORE: tl.constexpr, BLOCK: tl.constexpr):
    """One program writes one block of one weight's entries."""
    row_ptr = table_ptr + find_row(table_ptr, n_rows, 7).to(tl.int64) * 7
    offsets = (tl.program_id(0) - tl.load(row_ptr)) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < tl.load(row_ptr + 1)

    target = tl.load(row_ptr + 2)
    original = tl.load(row_ptr + 3)
    index_ptr = tl.load(row_ptr + 4).to(tl.pointer_type(tl.int32))
    delta_ptr = tl.load(row_ptr + 5).to(tl.pointer_type(tl.float32))
    kind = tl.load(row_ptr + 6)

    if kind == 1:
        write_block(target, original, index_ptr, delta_ptr, offsets, mask, tl.float32, RESTORE)
    elif kind == 2:
        write_block(target, original, index_ptr, delta_ptr, offsets, mask, tl.bfloat16, RESTORE)
    else:
        write_block(target, original, index_ptr, delta_ptr, offsets, mask, tl.float16, RESTORE)


def write_delta(
    targets: Sequence[Tensor],
    indices: Sequence[Tensor],
    originals: Sequence[Tensor],
    deltas: Sequence[Tensor] | None,
) -> None:
    """See `spt_kernels.ops.write_delta.write_delta`; all tensors are on one device."""
    kinds = [TARGET_KIND[target.dtype] for target in targets]
    added: Sequence[Tensor | int] = [0] * len(targets) if deltas is None else deltas
    table, n_programs = address_table(
        [index.numel() for index in indices], _BLOCK, [targets, originals, indices, added, kinds]
    )
    if n_programs == 0:
        return
    write_delta_kernel[(n_programs,)](
        upload(table, targets[0].device),
        n_rows=len(targets),
        RESTORE=deltas is None,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )


def shipped_variants() -> list[Variant]:
    """Writing and restoring; dtypes are told apart at run time, so that one launch serves all."""
    return [
        Variant(
            name=name,
            kernel=write_delta_kernel,
            types={"table_ptr": "*i64"},
            constexprs={"RESTORE": name == "restore", "BLOCK": _BLOCK},
            num_warps=_WARPS,
        )
        for name in ("write", "restore")
    ]
