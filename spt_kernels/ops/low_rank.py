"""The ops of a low-rank update: products of activations with factors of a handful of columns.

`low_rank_down` makes a bottleneck of activations, `low_rank_up` adds what comes out of it again,
`low_rank_grad` gives the gradient of the factor that leads down. Each goes over the activations
once, with the dropout and every change of dtype on the way.

Features may be in several ranges, as those of q, k and v, all of one width and evenly apart, each
with a factor of its own: a `Span` says how many, how wide, how far from one to the next, and where
the first starts.

A card has kernels for factors of up to 32 columns in fp32 and 64 in 16 bits; for more, for fp64 and
where all is dropped it runs the reference, as a CPU does (`low_rank_ways`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import low_rank_ways as ways
from .dropout import check_mask
from .dtypes import FLOATS_AND_FP64
from .launching import check_unrecorded, mark_mutated, register
from .low_rank_ways import NO_NORM, Activation, Norm, Span, seeded

_DROPPED = "float probability, int seed, Tensor? key"

# A `key` is given in place of the seed, which is then 0.
torch.library.define(
    "spt::low_rank_down",
    f"(Tensor input, Tensor factor, int[] span, float scale, {_DROPPED}) -> Tensor",
)
torch.library.define(
    "spt::low_rank_up",
    "(Tensor base, Tensor inner, Tensor factor, int[] span, float scale, "
    f"{_DROPPED}, ScalarType dtype, Tensor? bias=None) -> Tensor",
)
torch.library.define(
    "spt::low_rank_up_",
    "(Tensor(a!) base, Tensor inner, Tensor factor, int[] span, float scale, "
    f"{_DROPPED}, Tensor? bias=None) -> ()",
)
torch.library.define(
    "spt::low_rank_grad",
    f"(Tensor input, Tensor grad_inner, {_DROPPED}, str activation='none', "
    "Tensor? mean=None, Tensor? rstd=None, Tensor? weight=None, Tensor? bias=None) -> Tensor",
)


def low_rank_down(
    input: Tensor,
    factor: Tensor,
    span: Span | None = None,
    *,
    scale: float = 1.0,
    probability: float = 0.0,
    seed: int | Tensor = 0,
) -> Tensor:
    """`scale · dropout(input)_i F_i` of every range, side by side, with sums in fp32.

    Args:
        input: `[tokens, features]`, fp32, bf16, fp16 or fp64.
        factor: `[ranges · width, rank]`, floating; rounded to the dtype of `input`.
        span: the ranges of features; None for all of them as one.
        scale: of the products.
        probability: of an element of `input` to be dropped, as by `dropout`; not scaled for it.
        seed: of `dropout`.

    Returns:
        `[tokens, ranges · rank]`, contiguous, in the dtype of `input`.

    Raises:
        TypeError: a dtype is none of these.
        ValueError: a shape, a span, a device or a number does not fit.
    """
    span = _checked("input", input, factor, span, probability, seed)
    return torch.ops.spt.low_rank_down(input, factor, span, scale, probability, *seeded(seed))


def low_rank_up(
    base: Tensor,
    inner: Tensor,
    factor: Tensor,
    span: Span | None = None,
    *,
    scale: float = 1.0,
    probability: float = 0.0,
    seed: int | Tensor = 0,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`base + bias` and `scale · dropout(inner_i F_iᵀ)` of every range, with sums in fp32.

    Args:
        base: `[tokens, features]`, fp32, bf16, fp16 or fp64.
        inner: `[tokens, ranges · rank]`, of the dtype of `base`.
        factor: `[features, rank]`, floating; rounded to that dtype.
        span: the ranges, which are all features; None for these as one.
        scale: of the products.
        probability: of a product to be dropped, as an element of `base` would be by `dropout`.
        seed: of `dropout`.
        dtype: of the result; by default that of `base`.
        bias: `[features]`, floating, is added as well.

    Returns:
        `[tokens, features]`, contiguous.

    Raises:
        TypeError: a dtype is none of these.
        ValueError: a shape, a span, a device or a number does not fit.
    """
    span = _checked("base", base, factor, span, probability, seed)
    _check_inner(base, inner, span[0] * factor.shape[1])
    if not ways.covers_all(span, base.shape[1]):
        raise ValueError(f"span: expected one of all {base.shape[1]} features, got {span}")
    if bias is not None:
        _check_bias(base, bias, span)
    dtype = base.dtype if dtype is None else dtype
    if dtype not in FLOATS_AND_FP64:
        raise TypeError(f"dtype: expected fp32, bf16, fp16 or fp64, got {dtype}")
    dropped = probability, *seeded(seed)
    return torch.ops.spt.low_rank_up(base, inner, factor, span, scale, *dropped, dtype, bias)


def low_rank_up_(
    base: Tensor,
    inner: Tensor,
    factor: Tensor,
    span: Span | None = None,
    *,
    scale: float = 1.0,
    probability: float = 0.0,
    seed: int | Tensor = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """`low_rank_up` in place, on some ranges of features; `base` is contiguous and returned.

    Args:
        base: `[tokens, features]`, is written.
        inner: `[tokens, ranges · rank]`.
        factor: `[ranges · width, rank]`.
        span: the ranges of features; None for all of them as one.
        scale: of the products.
        probability: of a product to be dropped.
        seed: of `dropout`.
        bias: `[features]`, floating, is added as well, where the ranges are all features.

    Raises:
        TypeError: a dtype is none of these.
        ValueError: a shape, a span, a device or a number does not fit, or `base` is not contiguous,
            or needs a gradient, which would be that of what it was.
    """
    span = _checked("base", base, factor, span, probability, seed)
    _check_inner(base, inner, span[0] * factor.shape[1])
    if not base.is_contiguous():
        raise ValueError(f"base: expected it contiguous, got strides {base.stride()}")
    check_unrecorded("base", base)
    if bias is not None:
        _check_bias(base, bias, span)
    dropped = probability, *seeded(seed)
    torch.ops.spt.low_rank_up_(base, inner, factor, span, scale, *dropped, bias)
    return base


def low_rank_grad(
    input: Tensor,
    grad_inner: Tensor,
    *,
    probability: float = 0.0,
    seed: int | Tensor = 0,
    activation: Activation = "none",
    norm: Norm = NO_NORM,
) -> Tensor:
    """`grad_innerᵀ dropout(x)`: the gradient of a factor of `low_rank_down`, transposed.

    `x` is the input, or what a GELU or a LayerNorm has made of it, which is then never in memory.

    Args:
        input: `[tokens, features]`, fp32, bf16, fp16 or fp64.
        grad_inner: `[tokens, rank]`, of the same dtype; of a narrower one, to which `x` is rounded,
            where there is an activation.
        probability: of an element of `x` to be dropped, as by `dropout`.
        seed: of `dropout`.
        activation: `"none"`, `"gelu"`, `"tanh"` (its approximation) or `"layer_norm"`.
        norm: of a LayerNorm over the features what it keeps, as `rebuild_layer_norm` has it: mean
            and reciprocal deviation, one for each token, weight and bias `[features]`, or None.

    Returns:
        `[rank, features]`, fp32; fp64 of fp64.

    Raises:
        TypeError: a dtype is none of these.
        ValueError: a shape, a device, a number or an activation does not fit.
    """
    _check_activation("input", input, probability, seed)
    _check_inner(input, grad_inner, None, "grad_inner", may_differ=activation != "none")
    _check_norm(input, activation, norm)
    dropped = probability, *seeded(seed)
    return torch.ops.spt.low_rank_grad(input, grad_inner, *dropped, activation, *norm)


def _checked(
    name: str,
    activations: Tensor,
    factor: Tensor,
    span: Span | None,
    probability: float,
    seed: int | Tensor,
) -> Span:
    _check_activation(name, activations, probability, seed)
    if not factor.is_floating_point():
        raise TypeError(f"factor: expected floating, got {factor.dtype}")
    if factor.device != activations.device:
        raise ValueError(f"factor: expected device {activations.device}, got {factor.device}")
    n_features = activations.shape[1]
    n_ranges, width, step, first = span = (1, n_features, 0, 0) if span is None else span
    last = first + (n_ranges - 1) * step + width
    if min(span) < 0 or n_ranges < 1 or last > n_features or (n_ranges > 1 and step < width):
        raise ValueError(
            f"span: expected ranges apart from one another within {n_features} features, got {span}"
        )
    if factor.dim() != 2 or factor.shape[0] != n_ranges * width:
        raise ValueError(f"factor: expected [{n_ranges * width}, rank], got {list(factor.shape)}")
    return span


def _check_activation(name: str, tensor: Tensor, probability: float, seed: int | Tensor) -> None:
    if tensor.dtype not in FLOATS_AND_FP64:
        raise TypeError(f"{name}: expected fp32, bf16, fp16 or fp64, got {tensor.dtype}")
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected [tokens, features], got {list(tensor.shape)}")
    check_mask(probability, seed, tensor.device)


def _check_inner(
    activations: Tensor,
    inner: Tensor,
    columns: int | None,
    name: str = "inner",
    *,
    may_differ: bool = False,
) -> None:
    if inner.dtype not in FLOATS_AND_FP64 or (inner.dtype != activations.dtype and not may_differ):
        raise TypeError(f"{name}: expected {activations.dtype}, got {inner.dtype}")
    if inner.device != activations.device:
        raise ValueError(f"{name}: expected device {activations.device}, got {inner.device}")
    n_tokens = activations.shape[0]
    if inner.dim() != 2 or inner.shape[0] != n_tokens or columns not in (None, inner.shape[1]):
        shown = "rank" if columns is None else columns
        raise ValueError(f"{name}: expected [{n_tokens}, {shown}], got {list(inner.shape)}")


def _check_bias(base: Tensor, bias: Tensor, span: Span) -> None:
    n_features = base.shape[1]
    if not bias.is_floating_point():
        raise TypeError(f"bias: expected floating, got {bias.dtype}")
    if bias.device != base.device:
        raise ValueError(f"bias: expected device {base.device}, got {bias.device}")
    if bias.shape != (n_features,):
        raise ValueError(f"bias: expected [{n_features}], got {list(bias.shape)}")
    if not ways.covers_all(span, n_features):
        raise ValueError(
            f"bias: expected a span of all {n_features} features beside it, got {span}"
        )


def _check_norm(input: Tensor, activation: str, norm: Norm) -> None:
    if activation not in ("none", "gelu", "tanh", "layer_norm"):
        raise ValueError(
            f"activation: expected 'none', 'gelu', 'tanh' or 'layer_norm', got {activation!r}"
        )
    n_tokens, n_features = input.shape
    given = dict(zip(("mean", "rstd", "weight", "bias"), norm, strict=True))
    for name, tensor in given.items():
        if tensor is None:
            if activation == "layer_norm" and name in ("mean", "rstd"):
                raise ValueError(f"norm: expected a {name} of a LayerNorm, got None")
            continue
        if activation != "layer_norm":
            raise ValueError(f"norm: expected none beside {activation!r}, got a {name}")
        numel = n_tokens if name in ("mean", "rstd") else n_features
        if tensor.numel() != numel or tensor.device != input.device:
            raise ValueError(
                f"norm: expected {numel} values of {name} on {input.device}, got {tensor.numel()} "
                f"on {tensor.device}"
            )


def _up_(card: bool, base: Tensor, *arguments: Any) -> None:
    ways.up_(card, base, *arguments)
    if card:  # torch's own calls mark what they write
        mark_mutated((base,))


for _device, _card in (("cpu", False), ("cuda", True)):
    register("spt::low_rank_down", _device, functools.partial(ways.down, _card))
    register("spt::low_rank_up", _device, functools.partial(ways.up, _card))
    register("spt::low_rank_up_", _device, functools.partial(_up_, _card))
    register("spt::low_rank_grad", _device, functools.partial(ways.grad, _card))


@torch.library.register_fake("spt::low_rank_down")
def _fake_down(input: Tensor, factor: Tensor, span: Any, *_: Any) -> Tensor:
    return input.new_empty(input.shape[0], span[0] * factor.shape[1])


@torch.library.register_fake("spt::low_rank_up")
def _fake_up(base: Tensor, inner: Tensor, factor: Tensor, *rest: Any) -> Tensor:
    _span, _scale, _probability, _seed, _key, dtype, *_ = rest
    return base.new_empty(base.shape, dtype=dtype)


@torch.library.register_fake("spt::low_rank_grad")
def _fake_grad(input: Tensor, grad_inner: Tensor, *_: Any) -> Tensor:
    wide = torch.promote_types(grad_inner.dtype, torch.float32)
    return input.new_empty(grad_inner.shape[1], input.shape[1], dtype=wide)


torch.library.register_fake("spt::low_rank_up_", lambda *arguments: None)
