"""Triton kernel that lays tokens side by side, for kernels that read all tokens of few channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import cdiv
from .prepared_launch import PreparedLaunches, addressed, pointer_to
from .variant import FLOAT_DTYPES, POINTER, Variant, short_name

_BLOCK, _WARPS = 64, 4

_launches = PreparedLaunches()


@triton.jit(do_not_specialize=["n_tokens"])
def transpose_kernel(
    input_ptr,
    output_ptr,
    n_tokens,
    n_channels,
    padded_tokens,
    token_stride,
    channel_stride,
    BLOCK: tl.constexpr,
):
    """output[channel, token] = input[token, channel], and zeros past the last token."""
    token_blocks = padded_tokens // BLOCK
    tokens = (tl.program_id(0) % token_blocks) * BLOCK + tl.arange(0, BLOCK)
    channels = (tl.program_id(0) // token_blocks) * BLOCK + tl.arange(0, BLOCK)
    token_mask = tokens < n_tokens
    channel_mask = channels < n_channels
    tokens = tokens.to(tl.int64)
    channels = channels.to(tl.int64)

    input_ptrs = input_ptr + tokens[:, None] * token_stride + channels[None, :] * channel_stride
    values = tl.load(input_ptrs, mask=token_mask[:, None] & channel_mask[None, :], other=0.0)

    output_ptrs = output_ptr + channels[:, None] * padded_tokens + tokens[None, :]
    tl.store(output_ptrs, tl.trans(values), mask=channel_mask[:, None])


def transposed(matrix: Tensor) -> Tensor:
    """`[tokens, channels]` as `[channels, tokens]`, tokens padded with zeros to a multiple of 64.

    Padded, so that whoever reads blocks of tokens needs no mask, which would part the loads.
    """
    n_tokens, n_channels = matrix.shape
    padded_tokens = cdiv(n_tokens, _BLOCK) * _BLOCK
    output = torch.empty(n_channels, padded_tokens, dtype=matrix.dtype, device=matrix.device)
    if output.numel():
        sizes = n_tokens, n_channels, padded_tokens, *matrix.stride()
        pointers, aligned = addressed(matrix)
        key = matrix.get_device(), aligned, matrix.dtype, sizes
        made = _launches.get(key)
        if made is None:
            n_programs = padded_tokens // _BLOCK * cdiv(n_channels, _BLOCK)
            made = _launches.prepare(
                key,
                transpose_kernel,
                n_programs,
                (matrix, output),
                sizes,
                (),
                (_BLOCK,),
                num_warps=_WARPS,
            )
        made.launch(*pointers, pointer_to(output), *made.sizes, *made.constants)
    return output


def shipped_variants() -> list[Variant]:
    """One per dtype."""
    return [
        Variant(
            name=f"transpose-{short_name(dtype)}",
            kernel=transpose_kernel,
            types=dict.fromkeys(("input_ptr", "output_ptr"), POINTER[dtype]),
            constexprs={"channel_stride": 1, "BLOCK": _BLOCK},
            num_warps=_WARPS,
            load_bits=128,
            store_bits=128,
        )
        for dtype in FLOAT_DTYPES
    ]
