"""The products of a low-rank update with activations: the specification."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from .dropout import hashes
from .rebuild_input import rebuild_gelu, rebuild_layer_norm

Span = tuple[int, int, int, int]  # how many ranges of features, how wide, first to first, the first
Words = tuple[int, int, int]  # of a dropout's key, and its threshold; one of 0 keeps everything
Activation = Literal["none", "gelu", "tanh", "layer_norm"]
Norm = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def low_rank_down(input: Tensor, factor: Tensor, span: Span, scale: float, words: Words) -> Tensor:
    """`scale · dropout(input)_i F_i` of every range, side by side: `[tokens, ranges · rank]`.

    Args:
        input: `[tokens, features]`.
        factor: `[ranges · width, rank]`, rounded to the dtype of `input` before it is multiplied.
        span: the ranges of features.
        scale: of the products, in fp32.
        words: of the dropout of the elements of `input`.
    """
    kept = _kept(input, words).to(_wide(input))
    low = factor.to(input.dtype).to(kept.dtype)
    parts = [kept[:, features] @ low[own] * scale for features, own in _ranges(span)]
    return torch.cat(parts, 1).to(input.dtype)


def low_rank_up(
    base: Tensor,
    inner: Tensor,
    factor: Tensor,
    span: Span,
    scale: float,
    words: Words,
    bias: Tensor | None = None,
) -> Tensor:
    """`base + bias` and `scale · dropout(inner_i F_iᵀ)` of every range, fp32 or wider.

    Args:
        base: `[tokens, features]`.
        inner: `[tokens, ranges · rank]`, of the dtype of `base`.
        factor: `[ranges · width, rank]`, rounded to that before it is multiplied.
        span: the ranges of features.
        scale: of the products, in fp32.
        words: of the dropout, of elements that are counted as those of `base`.
        bias: `[features]`, or None.
    """
    added = torch.zeros_like(base, dtype=_wide(base))
    low = factor.to(base.dtype).to(added.dtype)
    for part, (features, own) in zip(
        inner.to(added.dtype).split(factor.shape[1], 1), _ranges(span), strict=True
    ):
        added[:, features] = part @ low[own].t() * scale
    added = _kept(added, words)
    return base + added if bias is None else base + bias + added


def low_rank_grad(
    input: Tensor,
    grad_inner: Tensor,
    words: Words,
    activation: Activation = "none",
    norm: Norm = (None,) * 4,
) -> Tensor:
    """`grad_innerᵀ dropout(activation(input))`, `[rank, features]`, fp32 or wider.

    Args:
        input: `[tokens, features]`.
        grad_inner: `[tokens, rank]`, to whose dtype the activation is rounded.
        words: of the dropout of the elements of the activation.
        activation: of the input: itself, a GELU, its tanh approximation, or a LayerNorm.
        norm: mean and reciprocal deviation of each token, weight and bias `[features]`, or None.
    """
    dtype, (mean, rstd, weight, bias) = grad_inner.dtype, norm
    if activation == "layer_norm":
        assert mean is not None
        assert rstd is not None
        x = rebuild_layer_norm(input, mean, rstd, weight, bias, 1, dtype)
    elif activation == "none":
        x = input.to(dtype)
    else:
        x = rebuild_gelu(input, "tanh" if activation == "tanh" else "none", dtype)
    wide = _wide(grad_inner)
    return grad_inner.to(wide).t() @ _kept(x, words).to(wide)


def _ranges(span: Span) -> Iterator[tuple[slice, slice]]:
    """Features of each range, and its rows of the factor."""
    n_ranges, width, step, first = span
    for n in range(n_ranges):
        start = first + n * step
        yield slice(start, start + width), slice(n * width, (n + 1) * width)


def _kept(tensor: Tensor, words: Words) -> Tensor:
    before, between, threshold = words
    if threshold == 0:
        return tensor
    positions = torch.arange(tensor.numel(), device=tensor.device)
    is_kept = hashes(positions, before, between) >= threshold
    return torch.where(is_kept.view(tensor.shape), tensor, 0.0)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
