"""The products of a low-rank update with activations: the specification."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .dropout import hashes

Span = tuple[int, int, int, int]  # how many ranges of features, how wide, first to first, the first
Words = tuple[int, int, int]  # of a dropout's key, and its threshold; one of 0 keeps everything


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


def low_rank_grad(input: Tensor, grad_inner: Tensor, words: Words) -> Tensor:
    """`grad_innerᵀ dropout(input)`, `[rank, features]`, fp32 or wider.

    Args:
        input: `[tokens, features]`.
        grad_inner: `[tokens, rank]`.
        words: of the dropout of the elements of `input`.
    """
    wide = _wide(input)
    return grad_inner.to(wide).t() @ _kept(input, words).to(wide)


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
