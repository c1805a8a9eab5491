"""Triton kernels that read entries of a matrix, and channels of an activation."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .card import cdiv
from .prepared_launch import PreparedLaunches, addressed, pointer_to
from .variant import FLOAT_DTYPES, POINTER, Variant, short_name

_WARPS = 4
# Two entries a thread: reads wait for memory, and all have to be on their way at once; torch's
# `index_select` goes through eight, one after the other.
_ENTRIES = 256
# Of channels a program writes whole words, of tokens whose rows lie in its cache.
_TOKENS, _CHANNELS = 32, 64

_launches = PreparedLaunches()


@triton.jit(do_not_specialize=["nnz"])
def entries_kernel(output_ptr, matrix_ptr, index_ptr, nnz, numel, BLOCK: tl.constexpr):
    """matrix[index], on a block of entries."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = entries < nnz
    index = tl.load(index_ptr + entries, mask=mask, other=0)
    # a position outside of the matrix is never read, and shows
    in_range = (index >= 0) & (index < numel)
    value = tl.load(matrix_ptr + index, mask=mask & in_range, other=float("nan"))
    tl.store(output_ptr + entries, value, mask=mask)


@triton.jit(do_not_specialize=["n_tokens"])
def channels_kernel(
    output_ptr,
    input_ptr,
    channels_ptr,
    n_tokens,
    n_taken,
    token_stride,
    channel_stride,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """input[:, channels], on a tile."""
    blocks = tl.cdiv(n_taken, BLOCK_CHANNELS)
    tokens = (tl.program_id(0) // blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    taken = (tl.program_id(0) % blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    channels = tl.load(channels_ptr + taken, mask=taken < n_taken, other=0).to(tl.int64)
    mask = (tokens < n_tokens)[:, None] & (taken < n_taken)[None, :]
    tokens = tokens.to(tl.int64)[:, None]
    places = tokens * token_stride + channels[None, :] * channel_stride
    values = tl.load(input_ptr + places, mask=mask, other=0.0)
    tl.store(output_ptr + tokens * n_taken + taken[None, :], values, mask=mask)


def take_entries(matrix: Tensor, index: Tensor) -> Tensor:
    """Entries `[nnz]` of a contiguous fp32 matrix at flat int32 positions; NaN outside of it."""
    nnz, numel = index.numel(), matrix.numel()
    output = matrix.new_empty(nnz)
    tensors = output, matrix, index
    pointers, aligned = addressed(matrix, index)
    key = "entries", matrix.get_device(), aligned, nnz, numel
    made = _launches.get(key)
    if made is None:
        programs, constants = cdiv(nnz, _ENTRIES), (_ENTRIES,)
        made = _launches.prepare(
            key, entries_kernel, programs, tensors, (nnz, numel), (), constants, num_warps=_WARPS
        )
    made.launch(pointer_to(output), *pointers, *made.sizes, *made.constants)
    return output


def take_channels(input: Tensor, channels: Tensor) -> Tensor:
    """`[tokens, taken]` of `[tokens, channels]`, at int32 positions that lie in it."""
    n_tokens, n_taken = len(input), len(channels)
    output = input.new_empty(n_tokens, n_taken)
    tensors = output, input, channels
    sizes = n_tokens, n_taken, *input.stride()
    pointers, aligned = addressed(input, channels)
    key = "channels", input.get_device(), aligned, input.dtype, sizes
    made = _launches.get(key)
    if made is None:
        programs = cdiv(n_tokens, _TOKENS) * cdiv(n_taken, _CHANNELS)
        constants = _TOKENS, _CHANNELS
        made = _launches.prepare(
            key, channels_kernel, programs, tensors, sizes, (), constants, num_warps=_WARPS
        )
    made.launch(pointer_to(output), *pointers, *made.sizes, *made.constants)
    return output


def shipped_variants() -> list[Variant]:
    """Entries of a gradient, which is of fp32; channels of each dtype."""
    return [
        Variant(
            name="entries-fp32",
            kernel=entries_kernel,
            types={"output_ptr": "*fp32", "matrix_ptr": "*fp32", "index_ptr": "*i32"},
            constexprs={"BLOCK": _ENTRIES},
            num_warps=_WARPS,
        ),
        *(
            Variant(
                name=f"channels-{short_name(dtype)}",
                kernel=channels_kernel,
                types=dict.fromkeys(("output_ptr", "input_ptr"), POINTER[dtype])
                | {"channels_ptr": "*i32"},
                constexprs={
                    "channel_stride": 1,
                    "BLOCK_TOKENS": _TOKENS,
                    "BLOCK_CHANNELS": _CHANNELS,
                },
                num_warps=_WARPS,
                store_bits=128,
            )
            for dtype in FLOAT_DTYPES
        ),
    ]
