"""Triton kernel for selected entries of a weight gradient by strips: rows times listed columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import Launch, capability_of
from .sampled_tiles import store_entries
from .tile_plan import STRIP_HEIGHT, TilePlan
from .token_split import split_tokens
from .transpose import transposed
from .variant import FLOAT_DTYPES, POINTER, Variant, short_name

_ENTRIES = 256  # sampled at a time


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
    is_fp32 = input.dtype == torch.float32
    launch = LAUNCHES[plan.width, is_fp32, capability_of(input.device)]
    n_tiles, nnz = len(plan.tiles), plan.order.numel()
    splits, tokens_per_split = split_tokens(len(input), n_tiles, launch, input.device)
    partial = torch.empty(splits, nnz, device=input.device)  # fp32
    strip_kernel[(n_tiles * splits,)](
        partial,
        kept,
        listed,
        lists,
        plan.tiles,
        plan.order,
        plan.places,
        n_tiles,
        nnz,
        len(input),
        tokens_per_split,
        kept.shape[1],
        *kept.stride(),
        listed.stride(0),
        HEIGHT=plan.block,
        WIDTH=plan.width,
        BLOCK_TOKENS=launch.tokens,
        BLOCK_ENTRIES=_ENTRIES,
        UPCAST=triton.knobs.runtime.interpret,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return partial


def shipped_variants() -> list[Variant]:
    """Every width in each dtype on each card."""
    return [
        _variant(dtype, width, capability)
        for dtype in FLOAT_DTYPES
        for width, is_fp32, capability in LAUNCHES
        if is_fp32 == (dtype == torch.float32)
    ]


def _variant(dtype: torch.dtype, width: int, capability: int) -> Variant:
    launch = LAUNCHES[width, dtype == torch.float32, capability]
    pointers = {"partial_ptr": "*fp32", "kept_ptr": POINTER[dtype], "listed_ptr": POINTER[dtype]}
    pointers |= dict.fromkeys(("lists_ptr", "tiles_ptr", "order_ptr"), "*i32")
    pointers |= {"places_ptr": "*i16"}
    multiples = ("tokens_per_split", "n_kept", "kept_token_stride", "listed_channel_stride")
    return Variant(
        name=f"strip-{short_name(dtype)}-{STRIP_HEIGHT}x{width}-sm_{capability}",
        kernel=strip_kernel,
        signature=pointers | dict.fromkeys(("n_tiles", "nnz", "n_tokens", *multiples), "i32"),
        constexprs={
            "kept_channel_stride": 1,
            "HEIGHT": STRIP_HEIGHT,
            "WIDTH": width,
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
