"""Triton kernel for selected entries of a weight gradient by square tiles of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import Launch, capability_of
from .tile_plan import TilePlan
from .token_split import split_tokens
from .variant import FLOAT_DTYPES, POINTER, Variant, short_name

_ENTRIES = 256  # sampled at a time

# By the tile's rows and columns, whether values are fp32, and the card: what fits without spilling,
# with two programs on a multiprocessor where that is possible, so that one computes while the other
# begins or ends. In fp32 the operands are in registers three times over (tf32x3 splits each), hence
# fewer tokens.
LAUNCHES = {
    (64, False, 80): Launch(tokens=64, num_warps=4, num_stages=3, programs_per_sm=4),
    (64, False, 86): Launch(tokens=64, num_warps=4, num_stages=3, programs_per_sm=3),
    (64, False, 90): Launch(tokens=64, num_warps=4, num_stages=3, programs_per_sm=4),
    (128, False, 80): Launch(tokens=32, num_warps=4, num_stages=4, programs_per_sm=2),
    (128, False, 86): Launch(tokens=32, num_warps=8, num_stages=3, programs_per_sm=1),
    (128, False, 90): Launch(tokens=64, num_warps=8, num_stages=3, programs_per_sm=2),
    (64, True, 80): Launch(tokens=16, num_warps=4, num_stages=3, programs_per_sm=4),
    (64, True, 86): Launch(tokens=16, num_warps=4, num_stages=3, programs_per_sm=3),
    (64, True, 90): Launch(tokens=16, num_warps=4, num_stages=3, programs_per_sm=4),
    (128, True, 80): Launch(tokens=16, num_warps=8, num_stages=3, programs_per_sm=1),
    (128, True, 86): Launch(tokens=16, num_warps=8, num_stages=3, programs_per_sm=1),
    (128, True, 90): Launch(tokens=32, num_warps=8, num_stages=3, programs_per_sm=1),
}


@triton.jit
def store_entries(
    product,
    partial_ptr,
    order_ptr,
    places_ptr,
    first_entry,
    last_entry,
    NUMEL: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):
    """partial[order[e]] = product[places[e]], for the entries of one tile."""
    flat = tl.reshape(product, (NUMEL,))
    for start in range(first_entry, last_entry, BLOCK_ENTRIES):
        entries = start + tl.arange(0, BLOCK_ENTRIES)
        mask = entries < last_entry
        places = tl.load(places_ptr + entries, mask=mask, other=0).to(tl.int32)
        order = tl.load(order_ptr + entries, mask=mask, other=0)
        sampled = tl.gather(flat, places, 0)
        tl.store(partial_ptr + order, sampled, mask=mask)


# no second compilation for counts that happen to be 1 or a multiple of 16
@triton.jit(do_not_specialize=["n_tiles", "nnz", "n_tokens"])
def tile_kernel(
    partial_ptr,
    grad_ptr,
    input_ptr,
    tiles_ptr,
    order_ptr,
    places_ptr,
    n_tiles,
    nnz,
    n_tokens,
    tokens_per_split,
    n_out,
    n_in,
    grad_token_stride,
    grad_out_stride,
    input_token_stride,
    input_in_stride,
    BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One non-empty tile over one split of the tokens: a product of which the entries are kept."""
    tile = tl.program_id(0) % n_tiles
    split = tl.program_id(0) // n_tiles
    outs = tl.load(tiles_ptr + tile * 4) * BLOCK + tl.arange(0, BLOCK)
    ins = tl.load(tiles_ptr + tile * 4 + 1) * BLOCK + tl.arange(0, BLOCK)
    first_entry = tl.load(tiles_ptr + tile * 4 + 2)
    last_entry = tl.load(tiles_ptr + tile * 4 + 3)
    out_mask = (outs < n_out)[:, None]
    in_mask = (ins < n_in)[None, :]
    # pointers, not values, are transposed: so the copy to shared memory can be asynchronous
    grad_ptrs = grad_ptr + outs.to(tl.int64)[:, None] * grad_out_stride
    input_ptrs = input_ptr + ins.to(tl.int64)[None, :] * input_in_stride
    first = split * tokens_per_split
    last = min(first + tokens_per_split, n_tokens)

    product = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(first, last, BLOCK_TOKENS):
        tokens = start + tl.arange(0, BLOCK_TOKENS)
        mask = tokens < last
        tokens = tokens.to(tl.int64)
        grad = tl.load(
            grad_ptrs + (tokens * grad_token_stride)[None, :],
            mask=out_mask & mask[None, :],
            other=0.0,
        )
        x = tl.load(
            input_ptrs + (tokens * input_token_stride)[:, None],
            mask=mask[:, None] & in_mask,
            other=0.0,
        )
        if UPCAST:
            grad = grad.to(tl.float32)
            x = x.to(tl.float32)
        product = tl.dot(grad, x, product, input_precision="tf32x3")

    store_entries(
        product,
        partial_ptr + split.to(tl.int64) * nnz,
        order_ptr,
        places_ptr,
        first_entry,
        last_entry,
        BLOCK * BLOCK,
        BLOCK_ENTRIES,
    )


def by_tiles(grad_output: Tensor, input: Tensor, plan: TilePlan) -> Tensor:
    """Entries by square tiles: partial sums `[splits, nnz]`, fp32."""
    if plan.rows.numel():
        grad_output = grad_output.index_select(1, plan.rows)
    if plan.columns.numel():
        input = input.index_select(1, plan.columns)
    is_fp32 = input.dtype == torch.float32
    launch = LAUNCHES[plan.block, is_fp32, capability_of(input.device)]
    n_tiles, nnz = len(plan.tiles), plan.order.numel()
    splits, tokens_per_split = split_tokens(len(input), n_tiles, launch, input.device)
    partial = torch.empty(splits, nnz, device=input.device)  # fp32
    tile_kernel[(n_tiles * splits,)](
        partial,
        grad_output,
        input,
        plan.tiles,
        plan.order,
        plan.places,
        n_tiles,
        nnz,
        len(input),
        tokens_per_split,
        grad_output.shape[1],
        input.shape[1],
        *grad_output.stride(),
        *input.stride(),
        BLOCK=plan.block,
        BLOCK_TOKENS=launch.tokens,
        BLOCK_ENTRIES=_ENTRIES,
        UPCAST=triton.knobs.runtime.interpret,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return partial


def shipped_variants() -> list[Variant]:
    """Both sizes in each dtype on each card."""
    return [
        _variant(dtype, block, capability)
        for dtype in FLOAT_DTYPES
        for block, is_fp32, capability in LAUNCHES
        if is_fp32 == (dtype == torch.float32)
    ]


def _variant(dtype: torch.dtype, block: int, capability: int) -> Variant:
    launch = LAUNCHES[block, dtype == torch.float32, capability]
    pointers = {
        "partial_ptr": "*fp32",
        "grad_ptr": POINTER[dtype],
        "input_ptr": POINTER[dtype],
        "tiles_ptr": "*i32",
        "order_ptr": "*i32",
        "places_ptr": "*i16",
    }
    multiples = ("tokens_per_split", "n_out", "n_in", "grad_token_stride", "input_token_stride")
    return Variant(
        name=f"tile-{short_name(dtype)}-{block}x{block}-sm_{capability}",
        kernel=tile_kernel,
        signature=pointers | dict.fromkeys(("n_tiles", "nnz", "n_tokens", *multiples), "i32"),
        constexprs={
            "grad_out_stride": 1,
            "input_in_stride": 1,
            "BLOCK": block,
            "BLOCK_TOKENS": launch.tokens,
            "BLOCK_ENTRIES": _ENTRIES,
            "UPCAST": False,
        },
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        aligned=(*pointers, *multiples),
        load_bits=128,
        capability=capability,
        programs_per_sm=launch.programs_per_sm,
    )
