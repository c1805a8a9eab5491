"""Triton kernel of the gradient of a thin factor: one pass over the activation, dropout and all."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import Launch, cdiv
from .dropout import is_kept
from .low_rank_parts import ACROSS, Dropped, constants_of, depth_and_columns, shipped_sizes
from .prepared_launch import PreparedLaunches, alignment
from .rebuild_input import gelu
from .token_split import split_tokens
from .variant import POINTER, Variant, short_name

_GRAD = Launch(tokens=64, num_warps=4, num_stages=3, programs_per_sm=2)

# Mean, reciprocal deviation, weight and bias of a LayerNorm, where there is one
Norm = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_launches = PreparedLaunches()


@triton.jit(do_not_specialize=["n_tokens", "rank", "before", "between", "threshold"])
def grad_kernel(
    partial_ptr,
    input_ptr,
    inner_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    key_ptr,
    n_tokens,
    tokens_per_split,
    n_features,
    rank,
    before: tl.int64,
    between: tl.int64,
    threshold: tl.int64,
    ACTIVATION: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPS: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dropout(activation(input))ᵀ grad_inner, of a block of features and a split of the tokens."""
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

    if HAS_WEIGHT:
        gain = tl.load(weight_ptr + features, mask=features < n_features, other=0.0)
    if HAS_BIAS:
        shift = tl.load(bias_ptr + features, mask=features < n_features, other=0.0)

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
        if ACTIVATION == "gelu" or ACTIVATION == "tanh":
            x = gelu(x.to(tl.float32), ACTIVATION == "tanh").to(x.dtype)
        if ACTIVATION == "layer_norm":
            mean = tl.load(mean_ptr + tokens, mask=mask, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + tokens, mask=mask, other=0.0).to(tl.float32)
            y = (x.to(tl.float32) - mean[None, :]) * rstd[None, :]
            if HAS_WEIGHT:
                y *= gain.to(tl.float32)[:, None]
            if HAS_BIAS:
                y += shift.to(tl.float32)[:, None]
            x = y.to(x.dtype)  # as the forward rounded it
        x = x.to(inner.dtype)
        if DROPS:
            x = tl.where(is_kept(places, before, between, threshold), x, 0.0).to(x.dtype)
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


def low_rank_grad(
    input: Tensor, grad_inner: Tensor, dropped: Dropped, activation: str, norm: Norm
) -> Tensor:
    """See `spt_kernels.reference.low_rank`; all contiguous."""
    n_tokens, n_features = input.shape
    rank = grad_inner.shape[1]
    if input.numel() == 0 or rank == 0:
        return torch.zeros(rank, n_features, dtype=torch.float32, device=input.device)
    words, key = dropped
    mean, rstd, weight, bias = norm
    given = (
        *(input if mean is None else mean, input if rstd is None else rstd),
        *(input if weight is None else weight, input if bias is None else bias),
    )
    sources = input, grad_inner, *given, input if key is None else key
    like = (
        *(input.get_device(), alignment(*sources), input.dtype, grad_inner.dtype, activation),
        *(n_tokens, n_features, rank, words[2] > 0, key is None, weight is None, bias is None),
        *[tensor.dtype for tensor in given],
    )
    splits, tokens_per_split = _splits(n_tokens, n_features, input.device)
    partial = torch.empty(splits, rank, n_features, dtype=torch.float32, device=input.device)
    made = _launches.get(like)
    if made is None:
        made = _launches.prepare(
            like,
            grad_kernel,
            cdiv(n_features, ACROSS) * splits,
            (partial, *sources),
            (n_tokens, tokens_per_split, n_features, rank),
            words,
            (
                *(activation, weight is not None, bias is not None, *dropped.constants),
                *_blocks(grad_inner.dtype, rank).values(),
            ),
            **_GRAD.options,
        )
    made.launch(partial, *sources, *made.sizes, *words, *made.constants)
    return partial.sum(0) if splits != 1 else partial[0]


@functools.lru_cache(256)
def _splits(n_tokens: int, n_features: int, device: torch.device) -> tuple[int, int]:
    return split_tokens(n_tokens, cdiv(n_features, ACROSS), _GRAD, device)


def _blocks(dtype: torch.dtype, rank: int) -> dict[str, Any]:
    tokens, columns = depth_and_columns(dtype, rank)
    return constants_of(tokens, ACROSS, columns)


def shipped_variants() -> list[Variant]:
    """Of an input that was kept with dropout, without which a library's product does; and made."""
    return [
        _variant(dtype, columns, activation, drops, source)
        for dtype, columns in shipped_sizes()
        for activation, drops, source in (
            ("none", True, dtype),
            ("gelu", False, dtype),
            ("tanh", True, dtype),
            ("layer_norm", True, torch.float32),
        )
    ]


def _variant(
    dtype: torch.dtype, columns: int, activation: str, drops: bool, source: torch.dtype
) -> Variant:
    is_norm = activation == "layer_norm"
    statistics = "*fp32" if is_norm else POINTER[source]
    return Variant(
        name=f"grad-{short_name(dtype)}-{columns}-of-{activation}",
        kernel=grad_kernel,
        types=dict.fromkeys(("input_ptr", "key_ptr", "weight_ptr", "bias_ptr"), POINTER[source])
        | dict.fromkeys(("mean_ptr", "rstd_ptr"), statistics)
        | {"inner_ptr": POINTER[dtype], "partial_ptr": "*fp32"},
        constexprs={"ACTIVATION": activation, "HAS_WEIGHT": is_norm, "HAS_BIAS": is_norm}
        | {"DROPS": drops, "IN_MEMORY": False}
        | _blocks(dtype, columns),
        programs_per_sm=_GRAD.programs_per_sm,
        **_GRAD.options,
    )
