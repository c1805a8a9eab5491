"""Triton kernel for selected entries of a weight gradient by tiles of it: squares or strips."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gradient_ways.tile_plan import STRIP_HEIGHT, TilePlan
from .card import INTERPRETED, Launch, capability_of
from .prepared_launch import PreparedLaunches, addressed, pointer_to
from .take import take_channels
from .token_split import split_tokens
from .transpose import transposed
from .variant import FLOAT_DTYPES, POINTER, Variant, short_name

_ENTRIES = 256  # sampled at a time

_PART = 64  # rows and columns of a tile that a program of two warps makes
_BY_PARTS = Launch(tokens=16, num_warps=2, num_stages=4, programs_per_sm=4)

_launches = PreparedLaunches()

# By the tile's height and width, whether values are fp32, and the card: what fits without spilling,
# with two programs on a multiprocessor where that is possible, so that one computes while the other
# begins or ends. On an RTX 3090 one strip of 256, when it is sampled, leaves no shared memory for a
# second, hence more warps to the one. In fp32 the operands are in registers three times over
# (tf32x3 splits each), hence fewer tokens. On Hopper two warps make products of fp32 by parts of
# 64×64 each: for its own units, which four would take, every part of a split factor goes through
# shared memory once more, behind a fence that seems to wait for what was asked for ahead.
LAUNCHES = {
    (64, 64, False, 80): Launch(tokens=64, num_warps=4, num_stages=3, programs_per_sm=4),
    (64, 64, False, 86): Launch(tokens=64, num_warps=4, num_stages=3, programs_per_sm=3),
    (64, 64, False, 90): Launch(tokens=64, num_warps=4, num_stages=3, programs_per_sm=4),
    (64, 64, True, 80): Launch(tokens=16, num_warps=4, num_stages=3, programs_per_sm=4),
    (64, 64, True, 86): Launch(tokens=16, num_warps=4, num_stages=3, programs_per_sm=3),
    (64, 64, True, 90): _BY_PARTS,
    (128, 128, False, 80): Launch(tokens=32, num_warps=4, num_stages=4, programs_per_sm=2),
    (128, 128, False, 86): Launch(tokens=32, num_warps=8, num_stages=3, programs_per_sm=1),
    (128, 128, False, 90): Launch(tokens=64, num_warps=8, num_stages=3, programs_per_sm=2),
    (128, 128, True, 80): Launch(tokens=16, num_warps=8, num_stages=3, programs_per_sm=1),
    (128, 128, True, 86): Launch(tokens=16, num_warps=8, num_stages=3, programs_per_sm=1),
    (128, 128, True, 90): _BY_PARTS,
    (64, 128, False, 80): Launch(tokens=64, num_warps=4, num_stages=3, programs_per_sm=3),
    (64, 128, False, 86): Launch(tokens=64, num_warps=4, num_stages=3, programs_per_sm=2),
    (64, 128, False, 90): Launch(tokens=64, num_warps=4, num_stages=3, programs_per_sm=3),
    (64, 128, True, 80): Launch(tokens=16, num_warps=4, num_stages=3, programs_per_sm=2),
    (64, 128, True, 86): Launch(tokens=16, num_warps=4, num_stages=3, programs_per_sm=2),
    (64, 128, True, 90): _BY_PARTS,
    (64, 256, False, 80): Launch(tokens=32, num_warps=4, num_stages=4, programs_per_sm=2),
    (64, 256, False, 86): Launch(tokens=32, num_warps=8, num_stages=3, programs_per_sm=1),
    (64, 256, False, 90): Launch(tokens=32, num_warps=4, num_stages=4, programs_per_sm=2),
    (64, 256, True, 80): Launch(tokens=16, num_warps=8, num_stages=3, programs_per_sm=1),
    (64, 256, True, 86): Launch(tokens=16, num_warps=8, num_stages=3, programs_per_sm=1),
    (64, 256, True, 90): _BY_PARTS,
}


# no second compilation for counts that happen to be 1 or a multiple of 16
@triton.jit(do_not_specialize=["n_tiles", "nnz", "n_tokens"])
def tile_kernel(
    partial_ptr,
    left_ptr,
    right_ptr,
    lists_ptr,
    tiles_ptr,
    order_ptr,
    places_ptr,
    n_tiles,
    nnz,
    n_tokens,
    tokens_per_split,
    n_left,
    n_right,
    left_token_stride,
    left_channel_stride,
    right_token_stride,
    right_channel_stride,
    LISTED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PART_HEIGHT: tl.constexpr,
    PART_WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A part of a non-empty tile over one split of the tokens, of which the entries are kept.

    LISTED it is a strip: its channels on the right are those of a list, and there tokens
    lie side by side, with zeros past the last one.
    """
    PARTS_ACROSS: tl.constexpr = WIDTH // PART_WIDTH
    PARTS: tl.constexpr = HEIGHT // PART_HEIGHT * PARTS_ACROSS
    part = tl.program_id(0) % PARTS
    tile = tl.program_id(0) // PARTS % n_tiles
    split = tl.program_id(0) // (PARTS * n_tiles)
    top = part // PARTS_ACROSS * PART_HEIGHT
    begin = part % PARTS_ACROSS * PART_WIDTH
    lefts = tl.load(tiles_ptr + tile * 4) * HEIGHT + top + tl.arange(0, PART_HEIGHT)
    places_across = begin + tl.arange(0, PART_WIDTH)
    across = tl.load(tiles_ptr + tile * 4 + 1)
    if not LISTED:
        rights = across * WIDTH + places_across
        right_mask = (rights < n_right)[None, :]
    else:
        rights = tl.load(lists_ptr + across.to(tl.int64) * WIDTH + places_across)
        right_mask = (rights >= 0)[None, :]
    left_mask = (lefts < n_left)[:, None]
    # pointers, not values, are transposed: so the copy to shared memory can be asynchronous
    left_ptrs = left_ptr + lefts.to(tl.int64)[:, None] * left_channel_stride
    right_ptrs = right_ptr + rights.to(tl.int64)[None, :] * right_channel_stride
    first = split * tokens_per_split
    last = min(first + tokens_per_split, n_tokens)

    product = tl.zeros((PART_HEIGHT, PART_WIDTH), dtype=tl.float32)
    for start in range(first, last, BLOCK_TOKENS):
        tokens = start + tl.arange(0, BLOCK_TOKENS)
        mask = tokens < last
        tokens = tokens.to(tl.int64)
        left = tl.load(
            left_ptrs + (tokens * left_token_stride)[None, :],
            mask=left_mask & mask[None, :],
            other=0.0,
        )
        # a mask over tokens would part the loads of a strip, which needs none
        right = tl.load(
            right_ptrs + (tokens * right_token_stride)[:, None],
            mask=mask[:, None] & right_mask if not LISTED else right_mask,
            other=0.0,
        )
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        product = tl.dot(left, right, product, input_precision="tf32x3")

    flat = tl.reshape(product, (PART_HEIGHT * PART_WIDTH,))
    partial_ptr += split.to(tl.int64) * nnz
    first_entry = tl.load(tiles_ptr + tile * 4 + 2)
    last_entry = tl.load(tiles_ptr + tile * 4 + 3)
    for start in range(first_entry, last_entry, BLOCK_ENTRIES):
        entries = start + tl.arange(0, BLOCK_ENTRIES)
        mask = entries < last_entry
        places = tl.load(places_ptr + entries, mask=mask, other=0).to(tl.int32)
        if PARTS > 1:
            rows = places // WIDTH - top
            columns = places % WIDTH - begin
            mask &= (rows >= 0) & (rows < PART_HEIGHT) & (columns >= 0) & (columns < PART_WIDTH)
            places = tl.where(mask, rows * PART_WIDTH + columns, 0)
        order = tl.load(order_ptr + entries, mask=mask, other=0)
        tl.store(partial_ptr + order, tl.gather(flat, places, 0), mask=mask)


def by_tiles(grad_output: Tensor, input: Tensor, plan: TilePlan) -> Tensor:
    """Entries by tiles: partial sums `[splits, nnz]`, fp32."""
    lists = plan.lists
    left, right, together, others = grad_output, input, plan.rows, plan.columns
    if plan.lists_rows:
        left, right, together, others = input, grad_output, plan.columns, plan.rows
    if together.numel():
        left = take_channels(left, together)
    if lists is not None:
        right = transposed(right).t()  # [tokens and zeros, channels]
    elif others.numel():
        right = take_channels(right, others)
    is_fp32, capability = input.dtype == torch.float32, capability_of(input.device)
    launch = LAUNCHES[plan.block, plan.width, is_fp32, capability]
    n_tiles, nnz = len(plan.tiles), plan.order.numel()
    parts = plan.block * plan.width // _PART**2 if _is_by_parts(launch) else 1
    splits, tokens_per_split = split_tokens(len(input), n_tiles * parts, launch, input.device)
    partial = torch.empty(splits, nnz, dtype=torch.float32, device=input.device)
    listed = lists is not None
    given = plan.tiles if lists is None else lists
    tensors = left, right, given, plan.tiles, plan.order, plan.places
    pointers, aligned = addressed(*tensors)
    sizes = (
        *(n_tiles, nnz, len(input), tokens_per_split, left.shape[1], right.shape[1]),
        *(*left.stride(), *right.stride()),
    )
    key = (
        input.get_device(),
        aligned,
        input.dtype,
        sizes,
        plan.block,
        plan.width,
        listed,
    )
    made = _launches.get(key)
    if made is None:
        constants = listed, *_constexprs(plan.block, plan.width, launch).values()
        made = _launches.prepare(
            key,
            tile_kernel,
            n_tiles * parts * splits,
            (partial, *tensors),
            sizes,
            (),
            constants,
            **launch.options,
        )
    made.launch(pointer_to(partial), *pointers, *made.sizes, *made.constants)
    return partial


def _is_by_parts(launch: Launch) -> bool:
    return launch.num_warps == 2


def _constexprs(height: int, width: int, launch: Launch) -> dict[str, int]:
    by_parts = _is_by_parts(launch)
    return {
        "HEIGHT": height,
        "WIDTH": width,
        "PART_HEIGHT": _PART if by_parts else height,
        "PART_WIDTH": _PART if by_parts else width,
        "BLOCK_TOKENS": launch.tokens,
        "BLOCK_ENTRIES": _ENTRIES,
        "UPCAST": INTERPRETED,
    }


def shipped_variants() -> list[Variant]:
    """Squares and strips of every size in each dtype on each card."""
    types = {"partial_ptr": "*fp32", "tiles_ptr": "*i32", "order_ptr": "*i32", "places_ptr": "*i16"}
    squares = {"LISTED": False, "left_channel_stride": 1, "right_channel_stride": 1}
    strips = {"LISTED": True, "left_channel_stride": 1, "right_token_stride": 1}
    return [
        Variant(
            name=f"{kind}-{short_name(dtype)}-{height}x{width}-sm_{capability}",
            kernel=tile_kernel,
            types=types
            | dict.fromkeys(("left_ptr", "right_ptr"), POINTER[dtype])
            | {"lists_ptr": "*i32"},
            constexprs=own | _constexprs(height, width, launch),
            load_bits=128,
            is_thin=_is_by_parts(launch),
            capability=capability,
            programs_per_sm=launch.programs_per_sm,
            **launch.options,
        )
        for dtype in FLOAT_DTYPES
        for (height, width, is_fp32, capability), launch in LAUNCHES.items()
        for kind, own in (("square", squares), ("strip", strips))
        if is_fp32 == (dtype == torch.float32)
        and (height == STRIP_HEIGHT if own is strips else height == width)
    ]
