"""Triton kernel for selected entries of a weight gradient by square tiles of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import INTERPRETED, Launch, capability_of
from .tile_plan import TilePlan
from .token_split import split_tokens
from .variant import FLOAT_DTYPES, POINTER, Variant, short_name

# How the kernels of tiles and of strips sample, and what they are given beside their operands
SAMPLING = {"BLOCK_ENTRIES": 256, "UPCAST": INTERPRETED}
PLAN_TYPES = {
    "partial_ptr": "*fp32",
    "tiles_ptr": "*i32",
    "order_ptr": "*i32",
    "places_ptr": "*i16",
}

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
    launch = LAUNCHES[plan.block, input.dtype == torch.float32, capability_of(input.device)]
    sizes = (grad_output.shape[1], input.shape[1], *grad_output.stride(), *input.stride())
    constexprs = _constexprs(plan.block, launch)
    return launch_tiles(
        tile_kernel, (grad_output, input), plan, len(input), sizes, launch, constexprs
    )


def launch_tiles(
    kernel: Any,
    operands: Sequence[Tensor],
    plan: TilePlan,
    n_tokens: int,
    sizes: Sequence[int],
    launch: Launch,
    constexprs: Mapping[str, int],
) -> Tensor:
    """Partial sums `[splits, nnz]`, fp32, by a program for each tile and split of the tokens.

    Args:
        kernel: of tiles or of strips.
        operands: what it reads besides the plan.
        plan: the tiles.
        n_tokens: that both factors have.
        sizes: the kernel's own, behind those that both kernels take.
        launch: how its programs walk the tokens.
        constexprs: what it is compiled for.
    """
    n_tiles, nnz, device = len(plan.tiles), plan.order.numel(), operands[0].device
    splits, tokens_per_split = split_tokens(n_tokens, n_tiles, launch, device)
    partial = torch.empty(splits, nnz, device=device)  # fp32
    kernel[(n_tiles * splits,)](
        partial,
        *operands,
        plan.tiles,
        plan.order,
        plan.places,
        n_tiles,
        nnz,
        n_tokens,
        tokens_per_split,
        *sizes,
        **constexprs,
        **launch.options,
    )
    return partial


def _constexprs(block: int, launch: Launch) -> dict[str, int]:
    return {"BLOCK": block, "BLOCK_TOKENS": launch.tokens, **SAMPLING}


def shipped_variants() -> list[Variant]:
    """Both sizes in each dtype on each card."""
    unit_strides = {"grad_out_stride": 1, "input_in_stride": 1}
    return [
        Variant(
            name=f"tile-{short_name(dtype)}-{block}x{block}-sm_{capability}",
            kernel=tile_kernel,
            types=PLAN_TYPES | dict.fromkeys(("grad_ptr", "input_ptr"), POINTER[dtype]),
            constexprs=unit_strides | _constexprs(block, launch),
            load_bits=128,
            capability=capability,
            programs_per_sm=launch.programs_per_sm,
            **launch.options,
        )
        for dtype in FLOAT_DTYPES
        for (block, is_fp32, capability), launch in LAUNCHES.items()
        if is_fp32 == (dtype == torch.float32)
    ]
