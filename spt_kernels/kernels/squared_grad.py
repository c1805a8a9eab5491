"""The Triton kernel that squares each sample's gradient of a matrix in registers, in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import INTERPRETED, cdiv, multiprocessors_of
from .squared_products import by_products
from .variant import FLOAT_DTYPES, POINTER, Variant, short_name


@dataclass(frozen=True)
class _Tile:
    """How much of the score one program owns, and how it walks the tokens."""

    out: int
    cols: int
    tokens: int
    num_warps: int
    num_stages: int
    programs_per_sm: int

    def count(self, n_out: int, n_in: int) -> int:
        """How many of them cover a score."""
        return cdiv(n_out, self.out) * cdiv(n_in, self.cols)


class _Split(NamedTuple):
    """How the tiles of a score are shared out, so that no multiprocessor is idle at the end.

    Attributes:
        whole: the first tiles, each a program, which fill the card once or more.
        rest: the tiles after those.
        parts: programs for each of these, with some of the samples each.
    """

    whole: int
    rest: int
    parts: int

    @classmethod
    def of(cls, tiles: int, at_once: int, n_samples: int) -> _Split:
        """Share out `tiles` on a card that holds `at_once` of their programs."""
        whole = tiles // at_once * at_once
        rest = tiles - whole
        parts = min(at_once // rest, n_samples) if rest else 1
        return cls(whole, rest, parts) if parts > 1 else cls(tiles, 0, 1)


# Two fp32 accumulators live in registers at once, the sample's gradient and the sum of squares: one
# program fills a multiprocessor, which waits for its loads unless many are on their way.
_LARGE = _Tile(out=128, cols=128, tokens=32, num_warps=8, num_stages=6, programs_per_sm=1)
_SMALL = _Tile(out=64, cols=64, tokens=32, num_warps=4, num_stages=4, programs_per_sm=3)
# From here on the large tiles alone fill the cards of today, and reuse each load more often.
_LARGE_FROM_TILES = 96
_GROUP = 8  # rows of tiles visited together, so that their inputs are still in L2
_ADDED_ROWS, _ADDED_WARPS = 8, 4  # of a tile, of a program that adds up its parts


@triton.jit
def _place(tile, n_out, n_in, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, GROUP: tl.constexpr):
    """The first row and the first column of a tile."""
    out_blocks = tl.cdiv(n_out, BLOCK_OUT)
    in_blocks = tl.cdiv(n_in, BLOCK_IN)
    group = tile // (GROUP * in_blocks)
    group_rows = min(out_blocks - group * GROUP, GROUP)
    within = tile % (GROUP * in_blocks)
    return (group * GROUP + within % group_rows) * BLOCK_OUT, (within // group_rows) * BLOCK_IN


# no second compilation for a batch or a token count that happens to be 1 or a multiple of 16
@triton.jit(do_not_specialize=["n_samples", "n_tokens", "n_whole", "n_parts"])
def matrix_kernel(
    score_ptr,
    part_ptr,
    grad_ptr,
    input_ptr,
    scale,
    n_samples,
    n_tokens,
    n_out,
    n_in,
    n_whole,
    n_parts,
    score_out_stride,
    score_in_stride,
    grad_sample_stride,
    grad_token_stride,
    grad_out_stride,
    input_sample_stride,
    input_token_stride,
    input_in_stride,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of the score: every sample's gradient in turn, squared, summed, written once.

    Or the same of some samples, a part of the sum, which `add_parts_kernel` adds up.
    """
    program = tl.program_id(0)
    tile = program
    first_sample = 0
    last_sample = n_samples
    if program >= n_whole:
        tile = n_whole + (program - n_whole) // n_parts
        part = (program - n_whole) % n_parts
        first_sample = part * n_samples // n_parts
        last_sample = (part + 1) * n_samples // n_parts
    row, column = _place(tile, n_out, n_in, BLOCK_OUT, BLOCK_IN, GROUP)
    outs = row + tl.arange(0, BLOCK_OUT)
    ins = column + tl.arange(0, BLOCK_IN)
    out_mask = outs < n_out
    in_mask = ins < n_in
    outs = outs.to(tl.int64)
    ins = ins.to(tl.int64)
    block_tokens = tl.arange(0, BLOCK_TOKENS)
    # pointers, not values, are transposed: so the copy to shared memory can be asynchronous
    grad_ptrs = grad_ptr + outs[:, None] * grad_out_stride
    input_ptrs = input_ptr + ins[None, :] * input_in_stride

    squares = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    gradient = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    # one flat loop over (sample, token block), so that the pipeline of loads never drains
    token_blocks = tl.cdiv(n_tokens, BLOCK_TOKENS)
    for step in range(first_sample * token_blocks, last_sample * token_blocks):
        sample = (step // token_blocks).to(tl.int64)
        tokens = (step % token_blocks) * BLOCK_TOKENS + block_tokens
        token_mask = tokens < n_tokens
        tokens = tokens.to(tl.int64)
        grad = tl.load(
            grad_ptrs + (sample * grad_sample_stride + tokens * grad_token_stride)[None, :],
            mask=out_mask[:, None] & token_mask[None, :],
            other=0.0,
        )
        x = tl.load(
            input_ptrs + (sample * input_sample_stride + tokens * input_token_stride)[:, None],
            mask=token_mask[:, None] & in_mask[None, :],
            other=0.0,
        )
        if UPCAST:
            grad = grad.to(tl.float32)
            x = x.to(tl.float32)
        gradient = tl.dot(grad, x, gradient)
        if step % token_blocks == token_blocks - 1:
            gradient *= scale
            squares += gradient * gradient
            gradient = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)

    if program < n_whole:
        score_ptrs = score_ptr + outs[:, None] * score_out_stride + ins[None, :] * score_in_stride
        mask = out_mask[:, None] & in_mask[None, :]
        tl.store(score_ptrs, tl.load(score_ptrs, mask=mask, other=0.0) + squares, mask=mask)
    else:
        part_ptr += (program - n_whole).to(tl.int64) * BLOCK_OUT * BLOCK_IN
        inside = tl.arange(0, BLOCK_OUT)[:, None] * BLOCK_IN + tl.arange(0, BLOCK_IN)[None, :]
        tl.store(part_ptr + inside, squares)


@triton.jit(do_not_specialize=["n_whole", "n_parts"])
def add_parts_kernel(
    score_ptr,
    part_ptr,
    n_out,
    n_in,
    n_whole,
    n_parts,
    score_out_stride,
    score_in_stride,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some rows of a tile that was summed in parts: these in their order, so the same bits."""
    rest = tl.program_id(0) // (BLOCK_OUT // ROWS)
    first_row = tl.program_id(0) % (BLOCK_OUT // ROWS) * ROWS
    row, column = _place(n_whole + rest, n_out, n_in, BLOCK_OUT, BLOCK_IN, GROUP)
    rows = first_row + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK_IN)[None, :]
    mask = (row + rows < n_out) & (column + columns < n_in)
    part_ptrs = part_ptr + rest.to(tl.int64) * n_parts * BLOCK_OUT * BLOCK_IN
    part_ptrs = part_ptrs + rows * BLOCK_IN + columns

    squares = tl.zeros((ROWS, BLOCK_IN), dtype=tl.float32)
    for _ in range(n_parts):
        squares += tl.load(part_ptrs)
        part_ptrs += BLOCK_OUT * BLOCK_IN

    score_ptrs = score_ptr + (row + rows).to(tl.int64) * score_out_stride
    score_ptrs += (column + columns).to(tl.int64) * score_in_stride
    tl.store(score_ptrs, tl.load(score_ptrs, mask=mask, other=0.0) + squares, mask=mask)


def accumulate_squared_grad(
    score: Tensor, grad_output: Tensor, input: Tensor, scale: float
) -> None:
    """See `spt_kernels.ops.squared_grad.accumulate_squared_grad`."""
    n_samples, n_tokens, n_out = grad_output.shape
    n_in = input.shape[2]
    if score.numel() == 0 or n_samples * n_tokens == 0:
        return
    if grad_output.dtype == torch.float32:
        return by_products(score, grad_output, input, scale)
    tile = _LARGE if _LARGE.count(n_out, n_in) >= _LARGE_FROM_TILES else _SMALL
    at_once = tile.programs_per_sm * multiprocessors_of(score.device)
    split = _Split.of(tile.count(n_out, n_in), at_once, n_samples)
    in_parts = split.rest * split.parts
    n_cells = in_parts * tile.out * tile.cols
    parts = torch.empty(n_cells, dtype=torch.float32, device=score.device)
    matrix_kernel[(split.whole + in_parts,)](
        score,
        parts if in_parts else score,
        grad_output,
        input,
        scale,
        n_samples,
        n_tokens,
        n_out,
        n_in,
        split.whole,
        split.parts,
        *score.stride(),
        *grad_output.stride(),
        *input.stride(),
        **_tile_of(tile),
        BLOCK_TOKENS=tile.tokens,
        UPCAST=INTERPRETED,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if in_parts:
        add_parts_kernel[(split.rest * (tile.out // _ADDED_ROWS),)](
            score,
            parts,
            n_out,
            n_in,
            split.whole,
            split.parts,
            *score.stride(),
            **_tile_of(tile),
            ROWS=_ADDED_ROWS,
            num_warps=_ADDED_WARPS,
        )


def shipped_variants() -> list[Variant]:
    """Both tiles in each dtype of 16 bits, and what adds up their parts."""
    tiles = (_LARGE, _SMALL)
    dtypes = [dtype for dtype in FLOAT_DTYPES if dtype.itemsize == 2]
    matrices = [_variant(dtype, tile) for dtype in dtypes for tile in tiles]
    return [*matrices, *(_added_variant(tile) for tile in tiles)]


def _tile_of(tile: _Tile) -> dict[str, int]:
    return {"BLOCK_OUT": tile.out, "BLOCK_IN": tile.cols, "GROUP": _GROUP}


def _variant(dtype: torch.dtype, tile: _Tile) -> Variant:
    unit_strides = dict.fromkeys(("score_in_stride", "grad_out_stride", "input_in_stride"), 1)
    return Variant(
        name=f"matrix-{short_name(dtype)}-{tile.out}x{tile.cols}",
        kernel=matrix_kernel,
        types={"score_ptr": "*fp32", "part_ptr": "*fp32", "scale": "fp32"}
        | {"grad_ptr": POINTER[dtype], "input_ptr": POINTER[dtype]},
        constexprs=unit_strides
        | _tile_of(tile)
        | {"BLOCK_TOKENS": tile.tokens, "UPCAST": INTERPRETED},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        load_bits=128,
        store_bits=128,
        programs_per_sm=tile.programs_per_sm,
    )


def _added_variant(tile: _Tile) -> Variant:
    return Variant(
        name=f"vector-add-parts-{tile.out}x{tile.cols}",
        kernel=add_parts_kernel,
        types={"score_ptr": "*fp32", "part_ptr": "*fp32"},
        constexprs={"score_in_stride": 1, "ROWS": _ADDED_ROWS} | _tile_of(tile),
        num_warps=_ADDED_WARPS,
        load_bits=128,
        store_bits=128,
    )
