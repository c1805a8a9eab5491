"""Triton kernels of a low-rank update: each reads or writes an activation once.

Factors have a handful of columns, so that a product with one is a pass over the activation and
nothing else. A library's takes a pass more for the dropout and for every change of dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import INTERPRETED, Launch
from .low_rank_sizes import MOST_COLUMNS
from .prepared_launch import PreparedLaunches
from .token_split import split_tokens
from .variant import POINTER, Variant, short_name

_LEAST_COLUMNS = 16  # of a factor in a product of tensor cores

Span = tuple[int, int, int, int]  # as `reference.low_rank` has them

_DOWN = Launch(tokens=64, num_warps=4, num_stages=3, programs_per_sm=2)
_UP = Launch(tokens=64, num_warps=4, num_stages=1, programs_per_sm=2)
_GRAD = Launch(tokens=64, num_warps=4, num_stages=3, programs_per_sm=2)
_ACROSS = 64  # of a block: fewer would leave Hopper's units for products unused

_launches = PreparedLaunches()


class Dropped(NamedTuple):
    """Which elements of an activation a kernel drops, by the words of `reference.low_rank`.

    Attributes:
        words: both of the key, and the threshold: 0 drops none.
        key: int64 `[2]`, the key in memory, in place of that in `words`.
    """

    words: tuple[int, int, int]
    key: Tensor | None = None

    @property
    def constants(self) -> tuple[bool, bool]:
        """What is compiled in: whether any are dropped, and whether the key is in memory."""
        return self.words[2] > 0, self.key is not None


@triton.jit
def _is_kept(positions, before, between, threshold):
    x = positions.to(tl.uint32) ^ before.to(tl.uint32)
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x ^= between.to(tl.uint32)
    x *= 0x846CA68B
    x ^= x >> 16
    return x >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["n_tokens", "rank", "n_outputs", "before", "between", "threshold"])
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
    rank,
    n_outputs,
    scale: tl.float32,
    before: tl.int64,
    between: tl.int64,
    threshold: tl.int64,
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
    column_mask = columns < rank
    if IN_MEMORY:
        before = tl.load(key_ptr)
        between = tl.load(key_ptr + 1)

    input_ptr += tokens * n_features + (first + one * step)
    factor_ptr += one.to(tl.int64) * width * rank  # of one range alone where it is not tall
    sums = tl.zeros((BLOCK_TOKENS, BLOCK_RANK), dtype=tl.float32)
    for start in range(0, width, BLOCK_FEATURES):
        features = start + tl.arange(0, BLOCK_FEATURES)
        mask = features < width
        x = tl.load(input_ptr + features[None, :], mask=token_mask & mask[None, :], other=0.0)
        if IS_TALL:
            factor_ptrs = factor_ptr + features[:, None] * rank + columns
        else:
            factor_ptrs = factor_ptr + columns * width + features[:, None]
        factor = tl.load(factor_ptrs, mask=mask[:, None] & column_mask, other=0.0).to(x.dtype)
        if DROPS:
            positions = tokens * n_features + features[None, :]
            x = tl.where(_is_kept(positions, before, between, threshold), x, 0.0).to(x.dtype)
        if UPCAST:
            x = x.to(tl.float32)
            factor = factor.to(tl.float32)
        sums = tl.dot(x, factor, sums, input_precision="tf32x3")

    tl.store(
        output_ptr + tokens * n_outputs + one * rank + columns,
        (sums * scale).to(output_ptr.dtype.element_ty),
        mask=token_mask & column_mask,
    )


@triton.jit(
    do_not_specialize=["n_tokens", "rank", "inner_stride", "before", "between", "threshold"]
)
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
    rank,
    inner_stride,
    scale: tl.float32,
    before: tl.int64,
    between: tl.int64,
    threshold: tl.int64,
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
    token_blocks = tl.cdiv(n_tokens, BLOCK_TOKENS)
    tokens = (tl.program_id(0) % token_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    across = tl.program_id(0) // token_blocks
    feature_blocks = tl.cdiv(width, BLOCK_FEATURES)
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

    inner = tl.load(
        inner_ptr + tokens * inner_stride + one * rank + columns[None, :],
        mask=token_mask & (columns < rank)[None, :],
        other=0.0,
    )
    factor_ptr += one.to(tl.int64) * width * rank
    if IS_TALL:
        factor_ptrs = factor_ptr + features[None, :] * rank + columns[:, None]
    else:
        factor_ptrs = factor_ptr + columns[:, None] * width + features[None, :]
    factor_mask = feature_mask & (columns < rank)[:, None]
    factor = tl.load(factor_ptrs, mask=factor_mask, other=0.0).to(inner.dtype)
    if UPCAST:
        inner = inner.to(tl.float32)
        factor = factor.to(tl.float32)
    added = tl.dot(inner, factor, input_precision="tf32x3") * scale
    features += first + one * step
    places = tokens * n_features + features[None, :]
    if DROPS:
        added = tl.where(_is_kept(places, before, between, threshold), added, 0.0)
    base = tl.load(base_ptr + places, mask=token_mask & feature_mask, other=0.0)
    total = base.to(tl.float32) + added
    if HAS_BIAS:
        total += tl.load(bias_ptr + features, mask=in_range, other=0.0).to(tl.float32)[None, :]
    tl.store(
        output_ptr + places,
        total.to(output_ptr.dtype.element_ty),
        mask=token_mask & feature_mask,
    )


@triton.jit(do_not_specialize=["n_tokens", "rank", "before", "between", "threshold"])
def grad_kernel(
    partial_ptr,
    input_ptr,
    inner_ptr,
    key_ptr,
    n_tokens,
    tokens_per_split,
    n_features,
    rank,
    before: tl.int64,
    between: tl.int64,
    threshold: tl.int64,
    DROPS: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dropout(input)ᵀ grad_inner of a block of features, over one split of the tokens."""
    feature_blocks = tl.cdiv(n_features, BLOCK_FEATURES)
    split = tl.program_id(0) // feature_blocks
    features = (tl.program_id(0) % feature_blocks) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    feature_mask = (features < n_features)[:, None]
    columns = tl.arange(0, BLOCK_RANK)[None, :]
    first = split * tokens_per_split
    last = min(first + tokens_per_split, n_tokens)
    if IN_MEMORY:
        before = tl.load(key_ptr)
        between = tl.load(key_ptr + 1)

    sums = tl.zeros((BLOCK_FEATURES, BLOCK_RANK), dtype=tl.float32)
    for start in range(first, last, BLOCK_TOKENS):
        tokens = start + tl.arange(0, BLOCK_TOKENS)
        mask = tokens < last
        tokens = tokens.to(tl.int64)
        places = tokens[None, :] * n_features + features[:, None]
        x = tl.load(input_ptr + places, mask=mask[None, :] & feature_mask, other=0.0)
        inner = tl.load(
            inner_ptr + tokens[:, None] * rank + columns,
            mask=mask[:, None] & (columns < rank),
            other=0.0,
        )
        if DROPS:
            x = tl.where(_is_kept(places, before, between, threshold), x, 0.0).to(x.dtype)
        if UPCAST:
            x = x.to(tl.float32)
            inner = inner.to(tl.float32)
        sums = tl.dot(x, inner, sums, input_precision="tf32x3")

    partial_ptr += split.to(tl.int64) * rank * n_features
    tl.store(
        partial_ptr + columns.to(tl.int64) * n_features + features[:, None],
        sums,
        mask=feature_mask & (columns < rank),
    )


def low_rank_down(
    input: Tensor, factor: Tensor, span: Span, scale: float, dropped: Dropped
) -> Tensor:
    """See `spt_kernels.reference.low_rank`; `input` is contiguous."""
    n_tokens, n_features = input.shape
    n_ranges, width, step, first = span
    factor, rank, is_tall = _laid_out(factor, n_ranges)
    output = input.new_empty(n_tokens, n_ranges * rank)
    if output.numel():
        blocks = _blocks(down_kernel, input.dtype is torch.float32, rank)
        _launches.launch(
            down_kernel,
            triton.cdiv(n_tokens, _ACROSS) * n_ranges,
            (output, input, factor, input if dropped.key is None else dropped.key),
            (n_tokens, n_features, first, step, width, rank, n_ranges * rank),
            (scale, *dropped.words),
            (is_tall, *dropped.constants, *blocks.values()),
            **_DOWN.options,
        )
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
) -> None:
    """See `spt_kernels.reference.low_rank`; into `output`, which may be `base`; all contiguous.

    Features without a range are left alone. Of `inner` a token's numbers lie side by side.
    """
    n_tokens, n_features = base.shape
    n_ranges, width, step, first = span
    factor, rank, is_tall = _laid_out(factor, n_ranges)
    key = base if dropped.key is None else dropped.key
    if base.numel() and factor.numel():
        blocks = _blocks(up_kernel, base.dtype is torch.float32, rank)
        feature_blocks = triton.cdiv(width, blocks["BLOCK_FEATURES"])
        _launches.launch(
            up_kernel,
            triton.cdiv(n_tokens, _ACROSS) * n_ranges * feature_blocks,
            (output, base, inner, factor, base if bias is None else bias, key),
            (n_tokens, n_features, first, step, width, rank, inner.stride(0)),
            (scale, *dropped.words),
            (bias is not None, is_tall, *dropped.constants, *blocks.values()),
            **_UP.options,
        )


def low_rank_grad(input: Tensor, grad_inner: Tensor, dropped: Dropped) -> Tensor:
    """See `spt_kernels.reference.low_rank`; both contiguous."""
    n_tokens, n_features = input.shape
    rank = grad_inner.shape[1]
    if input.numel() == 0 or rank == 0:
        return torch.zeros(rank, n_features, dtype=torch.float32, device=input.device)
    blocks = _blocks(grad_kernel, input.dtype is torch.float32, rank)
    feature_blocks = triton.cdiv(n_features, blocks["BLOCK_FEATURES"])
    splits, tokens_per_split = split_tokens(n_tokens, feature_blocks, _GRAD, input.device)
    partial = torch.empty(splits, rank, n_features, dtype=torch.float32, device=input.device)
    _launches.launch(
        grad_kernel,
        feature_blocks * splits,
        (partial, input, grad_inner, input if dropped.key is None else dropped.key),
        (n_tokens, tokens_per_split, n_features, rank),
        dropped.words,
        (*dropped.constants, *blocks.values()),
        **_GRAD.options,
    )
    return partial.sum(0) if splits != 1 else partial[0]


def _laid_out(factor: Tensor, n_ranges: int) -> tuple[Tensor, int, bool]:
    """A factor as a kernel reads it, its rank, and whether its rows lie one after the other."""
    rank = factor.shape[1]
    if n_ranges == 1 and factor.t().is_contiguous():
        return factor, rank, rank == 1
    return factor.contiguous(), rank, True


def _blocks(kernel: Any, is_fp32: bool, rank: int) -> dict[str, Any]:
    """The last constants of every kernel, in order."""
    columns = max(_LEAST_COLUMNS, triton.next_power_of_2(rank))
    # values of fp32 are in registers three times over (tf32x3 splits each)
    depth = _ACROSS // 2 if is_fp32 or columns > 32 else _ACROSS
    tokens, features = (depth, _ACROSS) if kernel is grad_kernel else (_ACROSS, depth)
    return {
        "BLOCK_TOKENS": tokens,
        "BLOCK_FEATURES": features,
        "BLOCK_RANK": columns,
        "UPCAST": INTERPRETED,
    }


def shipped_variants() -> list[Variant]:
    """What layers launch, in each dtype, for the fewest columns and the most."""
    return [
        variant
        for dtype, most in MOST_COLUMNS.items()
        for columns in (_LEAST_COLUMNS, most)
        for variant in _variants(dtype, columns)
    ]


def _variants(dtype: torch.dtype, columns: int) -> Iterator[Variant]:
    is_fp32 = dtype == torch.float32
    types = {"key_ptr": POINTER[dtype], "input_ptr": POINTER[dtype], "inner_ptr": POINTER[dtype]}

    def variant(kernel: Any, launch: Launch, out: torch.dtype, **flags: bool) -> Variant:
        kind = kernel.__name__.removesuffix("_kernel")
        shown = "".join(f"-{name}" for name, is_so in flags.items() if is_so)
        others = {"factor_ptr": "*fp32", "bias_ptr": "*fp32", "base_ptr": POINTER[dtype]}
        others |= dict.fromkeys(("output_ptr", "partial_ptr"), POINTER[out])
        return Variant(
            name=f"{kind}-{short_name(dtype)}-{columns}-to-{short_name(out)}{shown.lower()}",
            kernel=kernel,
            types={n: t for n, t in (types | others).items() if n in kernel.arg_names},
            constexprs=flags | {"IN_MEMORY": False} | _blocks(kernel, is_fp32, columns),
            programs_per_sm=launch.programs_per_sm,
            **launch.options,
        )

    for is_tall, drops in ((False, False), (False, True), (True, False)):
        yield variant(down_kernel, _DOWN, dtype, IS_TALL=is_tall, DROPS=drops)
        for out in (dtype,) if is_tall or is_fp32 else (dtype, torch.float32):
            yield variant(up_kernel, _UP, out, HAS_BIAS=is_tall, IS_TALL=is_tall, DROPS=drops)
    yield variant(grad_kernel, _GRAD, torch.float32, DROPS=True)
