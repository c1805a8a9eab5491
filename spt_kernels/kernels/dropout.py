"""Triton kernel of dropout by a hash of each element's position: one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .card import cdiv
from .variant import FLOAT_DTYPES, POINTER, Variant, short_name

# 2,048 elements a program: 16 a thread, so that each reads whole 128-bit words
_BLOCK, _WARPS = 2048, 4


@triton.jit
def is_kept(positions, before, between, threshold):
    """Whether the hashes of positions reach the threshold; words and threshold are int64."""
    x = positions.to(tl.uint32) ^ before.to(tl.uint32)
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x ^= between.to(tl.uint32)
    x *= 0x846CA68B
    x ^= x >> 16
    return x >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["before", "between", "threshold", "first"])
def dropout_kernel(
    input_ptr,
    output_ptr,
    key_ptr,
    n,
    before: tl.int64,
    between: tl.int64,
    threshold: tl.int64,
    first: tl.int64,
    BLOCK: tl.constexpr,
):
    """input where the hash of its position reaches the threshold, else 0.

    The words of the key are arguments or, where there is a pointer to them, in memory.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n

    if key_ptr is not None:
        before = tl.load(key_ptr)
        between = tl.load(key_ptr + 1)

    value = tl.load(input_ptr + offsets, mask=mask, other=0.0)
    kept = tl.where(is_kept(offsets + first, before, between, threshold), value, 0.0)
    tl.store(output_ptr + offsets, kept.to(value.dtype), mask=mask)


def dropout(
    input: Tensor,
    output: Tensor,
    before: int,
    between: int,
    threshold: int,
    first: int,
    key: Tensor | None = None,
) -> None:
    """See `spt_kernels.reference.dropout.dropout`; `key`, int64 `[2]`, is both words in memory."""
    n = input.numel()
    if n == 0:
        return
    dropout_kernel[(cdiv(n, _BLOCK),)](
        input,
        output,
        key,
        n=n,
        before=before,
        between=between,
        threshold=threshold,
        first=first,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )


def shipped_variants() -> list[Variant]:
    """Each dtype; a thread's 16 elements are hashed and compared in registers."""
    return [
        Variant(
            name=f"dropout-{short_name(dtype)}{'-key-in-memory' if in_memory else ''}",
            kernel=dropout_kernel,
            types=dict.fromkeys(("input_ptr", "output_ptr"), POINTER[dtype])
            | ({"key_ptr": "*i64"} if in_memory else {}),
            constexprs={"BLOCK": _BLOCK} | ({} if in_memory else {"key_ptr": None}),
            num_warps=_WARPS,
            load_bits=0 if in_memory else 128,  # the key's words are loaded one by one
        )
        for dtype in FLOAT_DTYPES
        for in_memory in (False, True)
    ]
