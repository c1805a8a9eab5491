"""Triton kernel that adds to a product what it lacks where single weights differ, span by span."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .address_table import address_table, find_row, upload
from .card import cdiv
from .transpose import transposed
from .variant import FLOAT_DTYPES, POINTER, Variant, short_name

# A program sums over the few entries of some rows one after another, for a block of tokens side by
# side: many small programs hide each other's latency
_TOKENS, _ROWS, _WARPS = 128, 16, 4

# How a kernel says which dtype weights are of
_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def first_at_least(index_ptr, n_entries, position):
    """How many of the sorted positions are below `position`."""
    first = 0
    last = n_entries.to(tl.int32)
    while first < last:
        middle = (first + last) // 2
        below = tl.load(index_ptr + middle).to(tl.int64) < position
        first = tl.where(below, middle + 1, first)
        last = tl.where(below, last, middle)
    return first


@triton.jit(do_not_specialize=["n_spans", "n_out", "n_in", "n_tokens"])
def add_sparse_rows_kernel(
    table_ptr,
    output_ptr,
    input_ptr,
    n_spans,
    n_out,
    n_in,
    n_tokens,
    WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program serves a block of tokens of one span and ROWS rows of the weight."""
    row_ptr = table_ptr + find_row(table_ptr, n_spans, 8).to(tl.int64) * 8
    program = tl.program_id(0) - tl.load(row_ptr)
    n_row_blocks = tl.cdiv(n_out, ROWS)
    tokens = tl.load(row_ptr + 2) + (program // n_row_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = tokens < tl.load(row_ptr + 3)
    n_entries = tl.load(row_ptr + 4)
    index_ptr = tl.load(row_ptr + 5).to(tl.pointer_type(tl.int32))
    before_ptr = tl.load(row_ptr + 6).to(tl.pointer_type(WEIGHT))
    after_ptr = tl.load(row_ptr + 7).to(tl.pointer_type(WEIGHT))
    dtype = output_ptr.dtype.element_ty

    n_in = n_in.to(tl.int64)
    row = (program % n_row_blocks) * ROWS
    entry = first_at_least(index_ptr, n_entries, row * n_in)
    end = first_at_least(index_ptr, n_entries, (row + ROWS) * n_in)
    output_ptrs = output_ptr + tokens * n_out
    while entry < end:
        row = tl.load(index_ptr + entry).to(tl.int64) // n_in
        total = tl.zeros([BLOCK], tl.float32)
        position = row * n_in
        while position < (row + 1) * n_in:  # the entries of one row
            position = tl.load(index_ptr + entry).to(tl.int64)
            before = tl.load(before_ptr + entry).to(dtype).to(tl.float32)
            change = tl.load(after_ptr + entry).to(dtype).to(tl.float32) - before
            column = input_ptr + (position - row * n_in) * n_tokens
            total += change * tl.load(column + tokens, mask=mask, other=0.0).to(tl.float32)

            entry += 1
            position = (row + 1) * n_in
            if entry < end:
                position = tl.load(index_ptr + entry).to(tl.int64)

        there = tl.load(output_ptrs + row, mask=mask, other=0.0).to(tl.float32)
        tl.store(output_ptrs + row, (there + total).to(dtype), mask=mask)


def add_sparse_rows(
    output: Tensor,
    input: Tensor,
    spans: Sequence[tuple[int, int]],
    indices: Sequence[Tensor],
    befores: Sequence[Tensor],
    afters: Sequence[Tensor],
) -> None:
    """See `spt_kernels.ops.add_sparse_rows.add_sparse_rows`; all tensors are on one device."""
    n_out, n_in = output.shape[1], input.shape[1]
    columns = transposed(input)  # [in, tokens]: an entry reads its column of many tokens at once
    n_row_blocks = cdiv(n_out, _ROWS)
    programs = [cdiv(stop - start, _TOKENS) * n_row_blocks for start, stop in spans]
    starts, stops = ([span[i] for span in spans] for i in range(2))
    nnzs = [index.numel() for index in indices]
    table, n_programs = address_table(
        [n if nnz else 0 for n, nnz in zip(programs, nnzs, strict=True)],
        1,
        [starts, stops, nnzs, indices, befores, afters],
    )
    if n_programs == 0:
        return
    add_sparse_rows_kernel[(n_programs,)](
        upload(table, output.device),
        output,
        columns,
        n_spans=len(spans),
        n_out=n_out,
        n_in=n_in,
        n_tokens=columns.shape[1],
        WEIGHT=_TRITON_DTYPES[befores[0].dtype],
        ROWS=_ROWS,
        BLOCK=_TOKENS,
        num_warps=_WARPS,
    )


def shipped_variants() -> list[Variant]:
    """One per dtype of activations and of weights, which autocast lets be wider."""
    return [
        Variant(
            name=f"rows-{short_name(dtype)}-weights-{short_name(weight)}",
            kernel=add_sparse_rows_kernel,
            types={
                "table_ptr": "*i64",
                **dict.fromkeys(("output_ptr", "input_ptr"), POINTER[dtype]),
            },
            constexprs={"WEIGHT": _TRITON_DTYPES[weight], "ROWS": _ROWS, "BLOCK": _TOKENS},
            num_warps=_WARPS,
        )
        for dtype in FLOAT_DTYPES
        for weight in dict.fromkeys((dtype, torch.float32))
    ]
