"""The Triton kernel that squares each sample's gradients of a norm's weight and of a bias."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import cdiv
from .variant import FLOAT_DTYPES, POINTER, Variant, short_name

_TOKENS, _CHANNELS, _WARPS = 32, 64, 4
_ROWS = 32  # in which a score is summed that has none of its own


# no second compilation for a batch or a token count that happens to be 1 or a multiple of 16
@triton.jit(do_not_specialize=["n_samples", "n_tokens", "n_rows"])
def vector_kernel(
    score_ptr,
    bias_score_ptr,
    grad_ptr,
    input_ptr,
    mean_ptr,
    rstd_ptr,
    scale,
    n_samples,
    n_tokens,
    n_channels,
    n_rows,
    grad_sample_stride,
    grad_token_stride,
    grad_channel_stride,
    input_sample_stride,
    input_token_stride,
    input_channel_stride,
    HAS_INPUT: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Squared gradients on a block of channels, of the samples that go to one row of the score."""
    channel_blocks = tl.cdiv(n_channels, BLOCK_CHANNELS)
    row = tl.program_id(0) // channel_blocks
    block = tl.program_id(0) % channel_blocks
    channels = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    channel_mask = channels < n_channels
    channels = channels.to(tl.int64)
    block_tokens = tl.arange(0, BLOCK_TOKENS)
    grad_ptrs = grad_ptr + channels[None, :] * grad_channel_stride
    input_ptrs = input_ptr + channels[None, :] * input_channel_stride

    squares = tl.zeros((BLOCK_CHANNELS,), dtype=tl.float32)
    bias_squares = tl.zeros((BLOCK_CHANNELS,), dtype=tl.float32)
    for step in range(tl.cdiv(n_samples - row, n_rows)):
        first = (row + step * n_rows).to(tl.int64)
        sums = tl.zeros((BLOCK_TOKENS, BLOCK_CHANNELS), dtype=tl.float32)
        bias_sums = tl.zeros((BLOCK_TOKENS, BLOCK_CHANNELS), dtype=tl.float32)
        for start in range(0, n_tokens, BLOCK_TOKENS):
            tokens = start + block_tokens
            token_mask = tokens < n_tokens
            mask = token_mask[:, None] & channel_mask[None, :]
            tokens = tokens.to(tl.int64)
            at = (first * grad_sample_stride + tokens * grad_token_stride)[:, None]
            grad = tl.load(grad_ptrs + at, mask=mask, other=0.0).to(tl.float32)
            if HAS_BIAS:
                bias_sums += grad
            if HAS_INPUT:
                at = (first * input_sample_stride + tokens * input_token_stride)[:, None]
                x = tl.load(input_ptrs + at, mask=mask, other=0.0).to(tl.float32)
                if HAS_STATISTICS:
                    at = first * n_tokens + tokens
                    mean = tl.load(mean_ptr + at, mask=token_mask, other=0.0)
                    rstd = tl.load(rstd_ptr + at, mask=token_mask, other=0.0)
                    x = (x - mean[:, None]) * rstd[:, None]
                grad *= x
            sums += grad
        gradient = tl.sum(sums, axis=0) * scale
        squares += gradient * gradient
        gradient = tl.sum(bias_sums, axis=0) * scale
        bias_squares += gradient * gradient

    at = tl.cast(row, tl.int64) * n_channels + channels
    before = tl.load(score_ptr + at, mask=channel_mask, other=0.0)
    tl.store(score_ptr + at, before + squares, mask=channel_mask)
    if HAS_BIAS:
        before = tl.load(bias_score_ptr + at, mask=channel_mask, other=0.0)
        tl.store(bias_score_ptr + at, before + bias_squares, mask=channel_mask)


def accumulate_squared_vector_grad(
    score: Tensor,
    grad_output: Tensor,
    input: Tensor | None,
    scale: float,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    bias_score: Tensor | None = None,
) -> None:
    """See `spt_kernels.ops.squared_grad.accumulate_squared_vector_grad`."""
    n_samples, n_tokens, n_channels = grad_output.shape
    if n_samples * n_tokens * n_channels == 0:
        return
    rows = _rows_of(score, n_samples)
    bias_rows = rows if bias_score is None else _rows_of(bias_score, n_samples)
    x = grad_output if input is None else input
    grid = (cdiv(n_channels, _CHANNELS) * rows.shape[0],)
    vector_kernel[grid](
        rows,
        bias_rows,
        grad_output,
        x,
        rows if mean is None else mean.contiguous(),
        rows if rstd is None else rstd.contiguous(),
        scale,
        n_samples,
        n_tokens,
        n_channels,
        rows.shape[0],
        *grad_output.stride(),
        *x.stride(),
        **_constexprs(input is not None, mean is not None, bias_score is not None),
        num_warps=_WARPS,
    )
    if rows is not score:
        score += rows.sum(0)
        if bias_score is not None:
            bias_score += bias_rows.sum(0)


def _rows_of(score: Tensor, n_samples: int) -> Tensor:
    # the channels alone (12 blocks at width 768) leave most of a card idle
    return score if score.dim() == 2 else score.new_zeros(min(n_samples, _ROWS), score.shape[0])


def shipped_variants() -> list[Variant]:
    """In each dtype: a bias, a factor, a norm's weight, and the latter two with a bias."""
    flags = [
        (False, False, False),
        *((True, statistics, bias) for statistics in (False, True) for bias in (False, True)),
    ]
    return [_variant(dtype, *some) for dtype in FLOAT_DTYPES for some in flags]


def _constexprs(has_input: bool, has_statistics: bool, has_bias: bool) -> dict[str, int]:
    return {
        "HAS_INPUT": has_input,
        "HAS_STATISTICS": has_statistics,
        "HAS_BIAS": has_bias,
        "BLOCK_TOKENS": _TOKENS,
        "BLOCK_CHANNELS": _CHANNELS,
    }


def _variant(dtype: torch.dtype, has_input: bool, has_statistics: bool, has_bias: bool) -> Variant:
    kind = "norm" if has_statistics else "input" if has_input else "ones"
    fp32 = ("score_ptr", "bias_score_ptr", "mean_ptr", "rstd_ptr")
    operands = {"grad_ptr": POINTER[dtype], "input_ptr": POINTER[dtype]}
    return Variant(
        name=f"vector-{short_name(dtype)}-{kind}{'-bias' if has_bias else ''}",
        kernel=vector_kernel,
        types=operands | dict.fromkeys(fp32, "*fp32") | {"scale": "fp32"},
        constexprs={"grad_channel_stride": 1, "input_channel_stride": 1}
        | _constexprs(has_input, has_statistics, has_bias),
        num_warps=_WARPS,
        num_stages=3,
        load_bits=128,
    )
