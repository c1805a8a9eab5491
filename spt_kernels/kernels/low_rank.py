"""Triton kernels of a low-rank update: each goes over an activation once.

Factors have a handful of columns, so that a product with one is a pass over the activation and
nothing else. A library's takes a pass more for the dropout and for every change of dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import Launch, cdiv
from .dropout import is_kept
from .low_rank_parts import TOKENS, Dropped, blocks_of, shipped_ranks
from .prepared_launch import PreparedLaunches, addressed, pointer_to
from .variant import POINTER, Variant, short_name

Span = tuple[int, int, int, int]  # as `reference.low_rank` has them

_DOWN = Launch(tokens=TOKENS, num_warps=4, num_stages=3, programs_per_sm=2)
_UP = Launch(tokens=TOKENS, num_warps=4, num_stages=1, programs_per_sm=4)

_launches = PreparedLaunches()


@triton.jit(do_not_specialize=["n_tokens", "n_outputs", "before", "between", "threshold"])
def down_kernel(
    output_ptr,
    input_ptr,
    factor_ptr,
    key_ptr,
    n_tokens,
    n_features,
    first,
    step,
    width,
    n_outputs,
    scale: tl.float32,
    before: tl.int64,
    between: tl.int64,
    threshold: tl.int64,
    RANK: tl.constexpr,
    IS_TALL: tl.constexpr,
    DROPS: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """scale · dropout(input) F of one range, on a block of tokens."""
    token_blocks = tl.cdiv(n_tokens, BLOCK_TOKENS)
    tokens = (tl.program_id(0) % token_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    one = tl.program_id(0) // token_blocks  # of the ranges
    token_mask = (tokens < n_tokens)[:, None]
    tokens = tokens.to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK_RANK)[None, :]
    column_mask = columns < RANK
    if IN_MEMORY:
        before = tl.load(key_ptr)
        between = tl.load(key_ptr + 1)

    starts = tokens * n_features + (first + one * step)  # of the range, in each token
    input_ptr += starts
    factor_ptr += one.to(tl.int64) * width * RANK  # of one range alone where it is not tall
    sums = tl.zeros((BLOCK_TOKENS, BLOCK_RANK), dtype=tl.float32)
    for start in range(0, width, BLOCK_FEATURES):
        features = start + tl.arange(0, BLOCK_FEATURES)
        mask = features < width
        x = tl.load(input_ptr + features[None, :], mask=token_mask & mask[None, :], other=0.0)
        if IS_TALL:
            factor_ptrs = factor_ptr + features[:, None] * RANK + columns
        else:
            factor_ptrs = factor_ptr + columns * width + features[:, None]
        factor = tl.load(factor_ptrs, mask=mask[:, None] & column_mask, other=0.0).to(x.dtype)
        if DROPS:
            positions = starts + features[None, :]
            x = tl.where(is_kept(positions, before, between, threshold), x, 0.0).to(x.dtype)
        if UPCAST:
            x = x.to(tl.float32)
            factor = factor.to(tl.float32)
        sums = tl.dot(x, factor, sums, input_precision="tf32x3")

    tl.store(
        output_ptr + tokens * n_outputs + one * RANK + columns,
        (sums * scale).to(output_ptr.dtype.element_ty),
        mask=token_mask & column_mask,
    )


@triton.jit(do_not_specialize=["n_tokens", "before", "between", "threshold"])
def up_kernel(
    output_ptr,
    base_ptr,
    inner_ptr,
    factor_ptr,
    bias_ptr,
    key_ptr,
    n_tokens,
    n_features,
    first,
    step,
    width,
    scale: tl.float32,
    before: tl.int64,
    between: tl.int64,
    threshold: tl.int64,
    RANK: tl.constexpr,
    N_RANGES: tl.constexpr,
    INNER_STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_TALL: tl.constexpr,
    DROPS: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """base + bias + scale · dropout(inner Fᵀ), on a tile of one range."""
    feature_blocks = tl.cdiv(width, BLOCK_FEATURES)
    # programs that run side by side go through the same tokens, whose memory lies side by side
    tokens = (tl.program_id(0) // (feature_blocks * N_RANGES)) * BLOCK_TOKENS
    tokens += tl.arange(0, BLOCK_TOKENS)
    across = tl.program_id(0) % (feature_blocks * N_RANGES)
    one = across // feature_blocks  # of the ranges
    features = (across % feature_blocks) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    token_mask = (tokens < n_tokens)[:, None]
    in_range = features < width
    feature_mask = in_range[None, :]
    tokens = tokens.to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK_RANK)
    if IN_MEMORY:
        before = tl.load(key_ptr)
        between = tl.load(key_ptr + 1)

    # most of what is read, hence asked for first
    placed = features + (first + one * step)
    places = tokens * n_features + placed[None, :]
    base = tl.load(base_ptr + places, mask=token_mask & feature_mask, other=0.0)
    inner = tl.load(
        inner_ptr + tokens * INNER_STRIDE + one * RANK + columns[None, :],
        mask=token_mask & (columns < RANK)[None, :],
        other=0.0,
    )
    factor_ptr += one.to(tl.int64) * width * RANK
    if IS_TALL:
        factor_ptrs = factor_ptr + features[None, :] * RANK + columns[:, None]
    else:
        factor_ptrs = factor_ptr + columns[:, None] * width + features[None, :]
    factor_mask = feature_mask & (columns < RANK)[:, None]
    factor = tl.load(factor_ptrs, mask=factor_mask, other=0.0).to(inner.dtype)
    if UPCAST:
        inner = inner.to(tl.float32)
        factor = factor.to(tl.float32)
    added = tl.dot(inner, factor, input_precision="tf32x3") * scale
    if DROPS:
        added = tl.where(is_kept(places, before, between, threshold), added, 0.0)
    total = base.to(tl.float32) + added
    if HAS_BIAS:
        total += tl.load(bias_ptr + placed, mask=in_range, other=0.0).to(tl.float32)[None, :]
    tl.store(
        output_ptr + places,
        total.to(output_ptr.dtype.element_ty),
        mask=token_mask & feature_mask,
    )


def low_rank_down(
    input: Tensor,
    factor: Tensor,
    span: Span,
    scale: float,
    dropped: Dropped,
    *,
    is_across: bool = False,
) -> Tensor:
    """See `spt_kernels.reference.low_rank`; of an input of any dimensions, `[..., features]`.

    A factor that `is_across` is given as `[rank, features]`, of one range.
    """
    input = input.contiguous()
    *lengths, n_features = input.shape
    n_tokens = math.prod(lengths)
    factor, rank, is_tall = _laid_out(factor, span[0], is_across)
    columns = span[0] * rank
    output = input.new_empty(n_tokens, columns)
    if n_tokens == 0 or columns == 0:
        return output
    words, key = dropped
    tensors = input, factor, input if key is None else key
    pointers, aligned = addressed(*tensors)
    like = (
        *("down", input.get_device(), aligned, input.dtype, factor.dtype),
        *(n_tokens, n_features, *span, rank, is_tall, words[2] > 0, key is None),
    )
    made = _launches.get(like)
    if made is None:
        blocks = blocks_of(input.dtype, rank)
        n_ranges, width, step, first = span
        made = _launches.prepare(
            like,
            down_kernel,
            cdiv(n_tokens, TOKENS) * n_ranges,
            (output, *tensors),
            (n_tokens, n_features, first, step, width, columns),
            (scale, *words),
            (rank, is_tall, *dropped.constants, *blocks.values()),
            **_DOWN.options,
        )
    made.launch(pointer_to(output), *pointers, *made.sizes, scale, *words, *made.constants)
    return output


def low_rank_up(
    base: Tensor,
    output: Tensor,
    inner: Tensor,
    factor: Tensor,
    span: Span,
    scale: float,
    dropped: Dropped,
    bias: Tensor | None = None,
    *,
    is_across: bool = False,
) -> None:
    """See `spt_kernels.reference.low_rank`; into `output`, which may be `base`, both contiguous.

    They are `[..., features]`, of any dimensions. Features without a range are left alone. A factor
    may be given as in `low_rank_down`.
    """
    *lengths, n_features = base.shape
    n_tokens = math.prod(lengths)
    inner = inner if inner.stride(1) == 1 else inner.contiguous()  # a token's numbers side by side
    bias = None if bias is None else bias.contiguous()
    factor, rank, is_tall = _laid_out(factor, span[0], is_across)
    if n_tokens == 0 or n_features == 0 or factor.numel() == 0:
        return
    words, key = dropped
    given_bias, given_key = base if bias is None else bias, base if key is None else key
    tensors = output, base, inner, factor, given_bias, given_key
    inner_stride = inner.stride(0)
    pointers, aligned = addressed(*tensors)
    like = (
        *("up", base.get_device(), aligned, base.dtype, output.dtype, factor.dtype),
        *(n_tokens, n_features, *span, rank, inner_stride, is_tall, words[2] > 0, key is None),
        None if bias is None else bias.dtype,
    )
    made = _launches.get(like)
    if made is None:
        blocks = blocks_of(base.dtype, rank)
        n_ranges, width, step, first = span
        made = _launches.prepare(
            like,
            up_kernel,
            cdiv(n_tokens, TOKENS) * n_ranges * cdiv(width, blocks["BLOCK_FEATURES"]),
            tensors,
            (n_tokens, n_features, first, step, width),
            (scale, *words),
            (
                *(rank, n_ranges, inner_stride, bias is not None, is_tall),
                *dropped.constants,
                *blocks.values(),
            ),
            **_UP.options,
        )
    made.launch(*pointers, *made.sizes, scale, *words, *made.constants)


def _laid_out(factor: Tensor, n_ranges: int, is_across: bool) -> tuple[Tensor, int, bool]:
    """A factor as a kernel reads it, its rank, and whether its rows lie one after the other."""
    if is_across:
        return factor.contiguous(), factor.shape[0], False
    n_rows, rank = factor.shape
    strides = factor.stride()
    if strides == (rank, 1):
        return factor, rank, True
    if n_ranges == 1 and strides == (1, n_rows):
        return factor, rank, False
    return factor.contiguous(), rank, True


def shipped_variants() -> list[Variant]:
    """What layers launch: the input by a factor, with dropout or without, and back again."""
    return [variant for dtype, rank in shipped_ranks() for variant in _variants(dtype, rank)]


def _variants(dtype: torch.dtype, rank: int) -> Iterator[Variant]:
    own = dict.fromkeys(("key_ptr", "input_ptr", "inner_ptr", "base_ptr"), POINTER[dtype])
    own |= {"factor_ptr": "*fp32", "bias_ptr": "*fp32"}

    def variant(kernel: Any, launch: Launch, out: torch.dtype, **flags: bool) -> Variant:
        kind = kernel.__name__.removesuffix("_kernel")
        shown = "".join(f"-{name.lower()}" for name, is_so in flags.items() if is_so)
        types = own | {"output_ptr": POINTER[out]}
        sizes = {"RANK": rank, "N_RANGES": 1, "INNER_STRIDE": rank}
        return Variant(
            name=f"{kind}-{short_name(dtype)}-{rank}-to-{short_name(out)}{shown}",
            kernel=kernel,
            types={name: kind for name, kind in types.items() if name in kernel.arg_names},
            constexprs={name: value for name, value in sizes.items() if name in kernel.arg_names}
            | flags
            | {"IN_MEMORY": False}
            | blocks_of(dtype, rank),
            is_thin=True,
            programs_per_sm=launch.programs_per_sm,
            **launch.options,
        )

    for is_tall, drops in ((False, False), (False, True), (True, False)):
        yield variant(down_kernel, _DOWN, dtype, IS_TALL=is_tall, DROPS=drops)
        for out in {dtype: None} if is_tall else {dtype: None, torch.float32: None}:
            yield variant(up_kernel, _UP, out, HAS_BIAS=is_tall, IS_TALL=is_tall, DROPS=drops)
