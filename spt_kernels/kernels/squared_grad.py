"""The Triton kernel that squares each sample's gradient of a matrix in registers, in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import INTERPRETED
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

    def count(self, n_out: int, n_in: int) -> int:
        """How many of them cover a score."""
        return triton.cdiv(n_out, self.out) * triton.cdiv(n_in, self.cols)


# Two fp32 accumulators live in registers at once, the sample's gradient and the sum of squares: one
# program fills a multiprocessor, which waits for its loads unless many are on their way.
_LARGE = _Tile(out=128, cols=128, tokens=32, num_warps=8, num_stages=6)
_SMALL = _Tile(out=64, cols=64, tokens=32, num_warps=4, num_stages=4)
# From here on the large tiles alone fill the cards of today, and reuse each load more often.
_LARGE_FROM_TILES = 96
_GROUP = 8  # rows of tiles visited together, so that their inputs are still in L2


# no second compilation for a batch or a token count that happens to be 1 or a multiple of 16
@triton.jit(do_not_specialize=["n_samples", "n_tokens"])
def matrix_kernel(
    score_ptr,
    grad_ptr,
    input_ptr,
    scale,
    n_samples,
    n_tokens,
    n_out,
    n_in,
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
    """One tile of the score: every sample's gradient in turn, squared, summed, written once."""
    out_blocks = tl.cdiv(n_out, BLOCK_OUT)
    in_blocks = tl.cdiv(n_in, BLOCK_IN)
    group = tl.program_id(0) // (GROUP * in_blocks)
    group_rows = min(out_blocks - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * in_blocks)
    outs = (group * GROUP + within % group_rows) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    ins = (within // group_rows) * BLOCK_IN + tl.arange(0, BLOCK_IN)
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
    for step in range(n_samples * token_blocks):
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

    score_ptrs = score_ptr + outs[:, None] * score_out_stride + ins[None, :] * score_in_stride
    mask = out_mask[:, None] & in_mask[None, :]
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
    matrix_kernel[(tile.count(n_out, n_in),)](
        score,
        grad_output,
        input,
        scale,
        n_samples,
        n_tokens,
        n_out,
        n_in,
        *score.stride(),
        *grad_output.stride(),
        *input.stride(),
        **_constexprs(tile),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def shipped_variants() -> list[Variant]:
    """Both tiles in each dtype of 16 bits."""
    dtypes = [dtype for dtype in FLOAT_DTYPES if dtype.itemsize == 2]
    return [_variant(dtype, tile) for dtype in dtypes for tile in (_LARGE, _SMALL)]


def _constexprs(tile: _Tile) -> dict[str, int]:
    return {
        "BLOCK_OUT": tile.out,
        "BLOCK_IN": tile.cols,
        "BLOCK_TOKENS": tile.tokens,
        "GROUP": _GROUP,
        "UPCAST": INTERPRETED,
    }


def _variant(dtype: torch.dtype, tile: _Tile) -> Variant:
    unit_strides = dict.fromkeys(("score_in_stride", "grad_out_stride", "input_in_stride"), 1)
    return Variant(
        name=f"matrix-{short_name(dtype)}-{tile.out}x{tile.cols}",
        kernel=matrix_kernel,
        types={"score_ptr": "*fp32", "grad_ptr": POINTER[dtype], "input_ptr": POINTER[dtype]}
        | {"scale": "fp32"},
        constexprs=unit_strides | _constexprs(tile),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        load_bits=128,
        store_bits=128,
    )
