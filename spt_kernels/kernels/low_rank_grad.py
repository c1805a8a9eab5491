"""Triton kernel of the gradient of a thin factor: one pass over the activation, dropout and all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import Launch, capability_of, cdiv
from .dropout import is_kept
from .low_rank_parts import TOKENS, Dropped, blocks_of, shipped_ranks
from .prepared_launch import PreparedLaunches, addressed, pointer_to
from .rebuild_input import gelu
from .token_split import split_tokens
from .variant import POINTER, Variant, short_name

# By card: depth of pipelining, and programs on a multiprocessor
_DEPTHS = {80: (3, 3), 86: (3, 2), 90: (4, 3)}

# Mean, reciprocal deviation, weight and bias of a LayerNorm, where there is one
Norm = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_launches = PreparedLaunches()


@triton.jit(do_not_specialize=["n_tokens", "before", "between", "threshold"])
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
    before: tl.int64,
    between: tl.int64,
    threshold: tl.int64,
    RANK: tl.constexpr,
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
    """grad_innerᵀ dropout(activation(input)), of a block of features and a split of the tokens."""
    feature_blocks = tl.cdiv(n_features, BLOCK_FEATURES)
    split = tl.program_id(0) // feature_blocks
    features = (tl.program_id(0) % feature_blocks) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    feature_mask = (features < n_features)[None, :]
    columns = tl.arange(0, BLOCK_RANK)[:, None]
    first = split * tokens_per_split
    last = min(first + tokens_per_split, n_tokens)
    if IN_MEMORY:
        before = tl.load(key_ptr)
        between = tl.load(key_ptr + 1)

    if HAS_WEIGHT:
        gain = tl.load(weight_ptr + features, mask=features < n_features, other=0.0)
    if HAS_BIAS:
        shift = tl.load(bias_ptr + features, mask=features < n_features, other=0.0)

    sums = tl.zeros((BLOCK_RANK, BLOCK_FEATURES), dtype=tl.float32)
    for start in range(first, last, BLOCK_TOKENS):
        tokens = start + tl.arange(0, BLOCK_TOKENS)
        mask = tokens < last
        tokens = tokens.to(tl.int64)
        places = tokens[:, None] * n_features + features[None, :]
        x = tl.load(input_ptr + places, mask=mask[:, None] & feature_mask, other=0.0)
        # pointers, not values, are transposed: so the copy to shared memory can be asynchronous
        inner = tl.load(
            inner_ptr + tokens[None, :] * RANK + columns,
            mask=mask[None, :] & (columns < RANK),
            other=0.0,
        )
        if ACTIVATION == "gelu" or ACTIVATION == "tanh":
            x = gelu(x.to(tl.float32), ACTIVATION == "tanh").to(x.dtype)
        if ACTIVATION == "layer_norm":
            mean = tl.load(mean_ptr + tokens, mask=mask, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + tokens, mask=mask, other=0.0).to(tl.float32)
            y = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
            if HAS_WEIGHT:
                y *= gain.to(tl.float32)[None, :]
            if HAS_BIAS:
                y += shift.to(tl.float32)[None, :]
            x = y.to(x.dtype)  # as the forward rounded it
        x = x.to(inner.dtype)
        if DROPS:
            x = tl.where(is_kept(places, before, between, threshold), x, 0.0).to(x.dtype)
        if UPCAST:
            x = x.to(tl.float32)
            inner = inner.to(tl.float32)
        sums = tl.dot(inner, x, sums, input_precision="tf32x3")

    partial_ptr += split.to(tl.int64) * RANK * n_features
    tl.store(
        partial_ptr + columns.to(tl.int64) * n_features + features[None, :],
        sums,
        mask=feature_mask & (columns < RANK),
    )


def low_rank_grad(
    input: Tensor, grad_inner: Tensor, dropped: Dropped, activation: str, norm: Norm
) -> Tensor:
    """See `spt_kernels.reference.low_rank`."""
    input, grad_inner = input.contiguous(), grad_inner.contiguous()
    n_tokens, n_features = input.shape
    rank = grad_inner.shape[1]
    if n_tokens == 0 or n_features == 0 or rank == 0:
        return torch.zeros(rank, n_features, dtype=torch.float32, device=input.device)
    words, key = dropped
    mean, rstd, weight, bias = norm
    in_memory = input if key is None else key
    if mean is None or rstd is None:  # without one no kernel reads what stands for it
        sources = input, grad_inner, input, input, input, input, in_memory
        of_norm: tuple[torch.dtype, ...] = ()
    else:
        given = (
            *(mean.contiguous(), rstd.contiguous()),
            *(input if weight is None else weight.contiguous(),),
            *(input if bias is None else bias.contiguous(),),
        )
        sources = input, grad_inner, *given, in_memory
        of_norm = tuple([tensor.dtype for tensor in given])
    pointers, aligned = addressed(*sources)
    like = (
        *(input.get_device(), aligned, input.dtype, grad_inner.dtype, activation),
        *(n_tokens, n_features, rank, words[2] > 0, key is None, weight is None, bias is None),
        of_norm,
    )
    made = _launches.get(like)
    if made is None:
        blocks = blocks_of(grad_inner.dtype, rank, is_made=activation != "none")
        programs = cdiv(n_features, blocks["BLOCK_FEATURES"])
        launch = _launch(blocks["BLOCK_RANK"], capability_of(input.device))
        splits, tokens_per_split = split_tokens(n_tokens, programs, launch, input.device)
        made = _launches.prepare(
            like,
            grad_kernel,
            programs * splits,
            (torch.empty(0, dtype=torch.float32, device=input.device), *sources),
            (n_tokens, tokens_per_split, n_features),
            words,
            (
                *(rank, activation, weight is not None, bias is not None, *dropped.constants),
                *blocks.values(),
            ),
            **launch.options,
        )
    splits = cdiv(n_tokens, made.sizes[1])  # of so many tokens each
    partial = input.new_empty(splits, rank, n_features, dtype=torch.float32)
    made.launch(pointer_to(partial), *pointers, *made.sizes, *words, *made.constants)
    return partial.sum(0) if splits != 1 else partial[0]


def _launch(columns: int, capability: int) -> Launch:
    num_stages, programs_per_sm = _DEPTHS[capability]
    return Launch(
        tokens=TOKENS,
        # rows of the product are columns of the factor: `TOKENS` says what 64 of them avoid so
        num_warps=2 if columns >= 64 else 4,
        num_stages=num_stages,
        programs_per_sm=programs_per_sm,
        # short splits: few features make few programs, of which each waits for its first reads
        least_tokens=128,
        most_splits=128,
    )


def shipped_variants() -> list[Variant]:
    """Of an input that was kept with dropout, without which a library's product does; and made."""
    return [
        _variant(capability, dtype, rank, activation, drops, source)
        for capability in _DEPTHS
        for dtype, rank in shipped_ranks()
        for activation, drops, source in (
            ("none", True, dtype),
            ("gelu", False, dtype),
            ("tanh", True, dtype),
            ("layer_norm", True, torch.float32),
        )
    ]


def _variant(
    capability: int,
    dtype: torch.dtype,
    rank: int,
    activation: str,
    drops: bool,
    source: torch.dtype,
) -> Variant:
    blocks = blocks_of(dtype, rank, is_made=activation != "none")
    launch = _launch(blocks["BLOCK_RANK"], capability)
    is_norm = activation == "layer_norm"
    statistics = "*fp32" if is_norm else POINTER[source]
    return Variant(
        name=f"grad-{short_name(dtype)}-{rank}-of-{activation}-sm_{capability}",
        kernel=grad_kernel,
        types=dict.fromkeys(("input_ptr", "key_ptr", "weight_ptr", "bias_ptr"), POINTER[source])
        | dict.fromkeys(("mean_ptr", "rstd_ptr"), statistics)
        | {"inner_ptr": POINTER[dtype], "partial_ptr": "*fp32"},
        constexprs={"ACTIVATION": activation, "HAS_WEIGHT": is_norm, "HAS_BIAS": is_norm}
        | {"RANK": rank, "DROPS": drops, "IN_MEMORY": False}
        | blocks,
        is_thin=True,
        capability=capability,
        programs_per_sm=launch.programs_per_sm,
        **launch.options,
    )
