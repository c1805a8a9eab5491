"""Triton kernel that hashes the bytes of many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .address_table import address_table, find_row, upload
from .variant import Variant

# 16 words a thread: enough loads in flight to fill the memory bus, and few sums to add up
_BLOCK, _WARPS = 2048, 4


@triton.jit
def mix(x, FACTOR: tl.constexpr):
    """A step that can be undone: the low half, times an even number, into all of it."""
    return x ^ ((x & 0xFFFFFFFF) * FACTOR)


@triton.jit
def swap_halves(x):
    """Rotate 64 bits by 32."""
    return (x << 32) | (x >> 32)


@triton.jit(do_not_specialize=["n_rows"])
def fingerprint_kernel(table_ptr, output_ptr, n_rows, BLOCK: tl.constexpr):
    """One program adds one block of words to the two sums of their tensor."""
    row = find_row(table_ptr, n_rows, 3)
    row_ptr = table_ptr + row.to(tl.int64) * 3
    offsets = (tl.program_id(0) - tl.load(row_ptr)) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < tl.load(row_ptr + 1)
    data_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.int64))

    key = (offsets.to(tl.int64) + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = tl.load(data_ptr + offsets, mask=mask, other=0).to(tl.uint64) + key
    x = swap_halves(mix(x, 0x7FEB352A))
    x = swap_halves(mix(x, 0x6C8E9CF6))
    x = swap_halves(mix(x, 0x5851F42E))
    first = tl.sum(tl.where(mask, x, 0).to(tl.int64))
    second = tl.sum(tl.where(mask, mix(x, 0x7A1D1B36), 0).to(tl.int64))

    # integers: the same bits in whichever order
    tl.atomic_add(output_ptr + row * 2, first, sem="relaxed")
    tl.atomic_add(output_ptr + row * 2 + 1, second, sem="relaxed")


def fingerprint(
    tensors: Sequence[Tensor], indices: Sequence[Tensor], originals: Sequence[Tensor]
) -> Tensor:
    """See `spt_kernels.ops.fingerprint.fingerprint`; all tensors are on one device."""
    words = [_words(*row) for row in zip(tensors, indices, originals, strict=True)]
    output = torch.zeros(len(words), 2, dtype=torch.int64, device=tensors[0].device)
    table, n_programs = address_table([len(w) for w in words], _BLOCK, [words])
    if n_programs > 0:
        fingerprint_kernel[(n_programs,)](
            upload(table, tensors[0].device),
            output,
            n_rows=len(words),
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return output


def _words(tensor: Tensor, index: Tensor, original: Tensor) -> Tensor:
    """The tensor's bytes as int64, with originals in place and zeros up to a whole word."""
    flat = tensor.view(-1)
    if len(index):
        flat = flat.index_put((index.long(),), original)
    data = flat.view(torch.uint8)
    if len(data) % 8 == 0 and data.data_ptr() % 16 == 0:
        return data.view(torch.int64)
    return torch.nn.functional.pad(data, (0, -len(data) % 8)).view(torch.int64)


def shipped_variants() -> list[Variant]:
    """The one kernel here; bytes are bytes, whatever the dtype."""
    return [
        Variant(
            name="fingerprint",
            kernel=fingerprint_kernel,
            types={"table_ptr": "*i64", "output_ptr": "*i64"},
            constexprs={"BLOCK": _BLOCK},
            num_warps=_WARPS,
            load_bits=64,
        )
    ]
