"""Triton kernel for selected entries of a weight gradient by strips: rows times listed columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import Launch, capability_of
from .sampled_tiles import PLAN_TYPES, SAMPLING, launch_tiles, store_entries
from .tile_plan import STRIP_HEIGHT, TilePlan
from .transpose import transposed
from .variant import FLOAT_DTYPES, POINTER, Variant, short_name

# By the strip's width, whether values are fp32, and the card: what fits without spilling, with two
# programs on a multiprocessor where that is possible. On an RTX 3090 one strip of 256, when it is
# sampled, leaves no shared memory for a second, hence more warps to the one. In fp32 the operands
# are in registers three times over (tf32x3 splits each), hence fewer tokens.
LAUNCHES = {
    (64, False, 80): Launch(tokens=64, num_warps=4, num_stages=3, programs_per_sm=4),
    (64, False, 86): Launch(tokens=64, num_warps=4, num_stages=3, programs_per_sm=3),
    (64, False, 90): Launch(tokens=64, num_warps=4, num_stages=3, programs_per_sm=4),
    (128, False, 80): Launch(tokens=64, num_warps=4, num_stages=3, programs_per_sm=3),
    (128, False, 86): Launch(tokens=64, num_warps=4, num_stages=3, programs_per_sm=2),
    (128, False, 90): Launch(tokens=64, num_warps=4, num_stages=3, programs_per_sm=3),
    (256, False, 80): Launch(tokens=32, num_warps=4, num_stages=4, programs_per_sm=2),
    (256, False, 86): Launch(tokens=32, num_warps=8, num_stages=3, programs_per_sm=1),
    (256, False, 90): Launch(tokens=32, num_warps=4, num_stages=4, programs_per_sm=2),
    (64, True, 80): Launch(tokens=16, num_warps=4, num_stages=3, programs_per_sm=4),
    (64, True, 86): Launch(tokens=16, num_warps=4, num_stages=3, programs_per_sm=3),
    (64, True, 90): Launch(tokens=16, num_warps=4, num_stages=3, programs_per_sm=4),
    (128, True, 80): Launch(tokens=16, num_warps=4, num_stages=3, programs_per_sm=2),
    (128, True, 86): Launch(tokens=16, num_warps=4, num_stages=3, programs_per_sm=2),
    (128, True, 90): Launch(tokens=16, num_warps=4, num_stages=3, programs_per_sm=2),
    (256, True, 80): Launch(tokens=16, num_warps=8, num_stages=3, programs_per_sm=1),
    (256, True, 86): Launch(tokens=16, num_warps=8, num_stages=3, programs_per_sm=1),
    (256, True, 90): Launch(tokens=16, num_warps=8, num_stages=3, programs_per_sm=1),
}


# no second compilation for counts that happen to be 1 or a multiple of 16
@triton.jit(do_not_specialize=["n_tiles", "nnz", "n_tokens"])
def strip_kernel(
    partial_ptr,
    kept_ptr,
    listed_ptr,
    lists_ptr,
    tiles_ptr,
    order_ptr,
    places_ptr,
    n_tiles,
    nnz,
    n_tokens,
    tokens_per_split,
    n_kept,
    kept_token_stride,
    kept_channel_stride,
    listed_channel_stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One strip over one split of the tokens; `listed` has tokens side by side, and zeros after."""
    tile = tl.program_id(0) % n_tiles
    split = tl.program_id(0) // n_tiles
    kept = tl.load(tiles_ptr + tile * 4) * HEIGHT + tl.arange(0, HEIGHT)
    list_ptr = lists_ptr + tl.load(tiles_ptr + tile * 4 + 1).to(tl.int64) * WIDTH
    listed = tl.load(list_ptr + tl.arange(0, WIDTH))
    first_entry = tl.load(tiles_ptr + tile * 4 + 2)
    last_entry = tl.load(tiles_ptr + tile * 4 + 3)
    kept_mask = (kept < n_kept)[:, None]
    listed_mask = (listed >= 0)[None, :]
    # pointers, not values, are transposed: so the copy to shared memory can be asynchronous
    kept_ptrs = kept_ptr + kept.to(tl.int64)[:, None] * kept_channel_stride
    listed_ptrs = listed_ptr + listed.to(tl.int64)[None, :] * listed_channel_stride
    first = split * tokens_per_split
    last = min(first + tokens_per_split, n_tokens)

    product = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
    for start in range(first, last, BLOCK_TOKENS):
        tokens = start + tl.arange(0, BLOCK_TOKENS)
        mask = tokens < last
        tokens = tokens.to(tl.int64)
        left = tl.load(
            kept_ptrs + (tokens * kept_token_stride)[None, :],
            mask=kept_mask & mask[None, :],
            other=0.0,
        )
        # no mask over tokens, which would part the loads: past the last one there are zeros
        right = tl.load(listed_ptrs + tokens[:, None], mask=listed_mask, other=0.0)
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        product = tl.dot(left, right, product, input_precision="tf32x3")

    store_entries(
        product,
        partial_ptr + split.to(tl.int64) * nnz,
        order_ptr,
        places_ptr,
        first_entry,
        last_entry,
        HEIGHT * WIDTH,
        BLOCK_ENTRIES,
    )


def by_strips(grad_output: Tensor, input: Tensor, plan: TilePlan) -> Tensor:
    """Entries by strips: partial sums `[splits, nnz]`, fp32."""
    if plan.lists_rows:
        kept, listed, together, lists = input, grad_output, plan.columns, plan.rows
    else:
        kept, listed, together, lists = grad_output, input, plan.rows, plan.columns
    if together.numel():
        kept = kept.index_select(1, together)
    listed = transposed(listed)  # [channels, tokens and zeros]
    launch = LAUNCHES[plan.width, input.dtype == torch.float32, capability_of(input.device)]
    sizes = (kept.shape[1], *kept.stride(), listed.stride(0))
    constexprs = _constexprs(plan.width, launch)
    return launch_tiles(
        strip_kernel, (kept, listed, lists), plan, len(input), sizes, launch, constexprs
    )


def _constexprs(width: int, launch: Launch) -> dict[str, int]:
    return {"HEIGHT": STRIP_HEIGHT, "WIDTH": width, "BLOCK_TOKENS": launch.tokens, **SAMPLING}


def shipped_variants() -> list[Variant]:
    """Every width in each dtype on each card."""
    return [
        Variant(
            name=f"strip-{short_name(dtype)}-{STRIP_HEIGHT}x{width}-sm_{capability}",
            kernel=strip_kernel,
            types=PLAN_TYPES
            | {"kept_ptr": POINTER[dtype], "listed_ptr": POINTER[dtype], "lists_ptr": "*i32"},
            constexprs={"kept_channel_stride": 1, **_constexprs(width, launch)},
            load_bits=128,
            capability=capability,
            programs_per_sm=launch.programs_per_sm,
            **launch.options,
        )
        for dtype in FLOAT_DTYPES
        for (width, is_fp32, capability), launch in LAUNCHES.items()
        if is_fp32 == (dtype == torch.float32)
    ]
