"""What the ops of a low-rank update run where.

On a card the kernels, for factors of up to 32 columns in fp32 and 64 in 16 bits (`MOST_COLUMNS`):
of more, registers would spill. For these, for fp64, and where all is dropped (a probability of 1) a
card runs the reference, as a CPU does for everything. What a CPU has in C++ is for whole calls of a
layer (`native.low_rank`), and no op.

Layers launch from here (`launch_…`), past the dispatcher; the registered ops (`low_rank`) are for
people, compilers and whoever listens. Both come to `down`, `up`, `up_` and `grad`: whether this is
on a card, then the arguments of the schemas, of which a mask is a probability, a seed, and the key
that is given in its place.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from ..reference import low_rank as reference
from .dropout import known_key_of, known_threshold_of
from .launching import may_launch, on_card

Span = tuple[int, int, int, int]
Activation = Literal["none", "gelu", "tanh", "layer_norm"]
Norm = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NO_NORM: Norm = (None, None, None, None)

# Columns of a factor that the kernels take, as `kernels.low_rank_parts` has them
MOST_COLUMNS = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}


def serves(dtype: torch.dtype, rank: int) -> bool:
    """Whether the kernels for a card are for activations of this dtype and so many columns."""
    return 0 < rank <= MOST_COLUMNS.get(dtype, 0)


def covers_all(span: Span, n_features: int) -> bool:
    """Whether the ranges are all of so many features."""
    n_ranges, width, step, _ = span
    return n_ranges * width == n_features and (n_ranges == 1 or step == width)


def launch_down(
    input: Tensor, factor: Tensor, span: Span, scale: float, probability: float, seed: int | Tensor
) -> Tensor:
    """`low_rank_down` without its checks, past the dispatcher where nobody listens."""
    arguments = input, factor, span, scale, probability, *seeded(seed)
    if may_launch(input) and type(factor) is Tensor:
        return down(input.is_cuda, *arguments)
    return torch.ops.spt.low_rank_down(*arguments)  # type: ignore[no-any-return]


def launch_up(
    base: Tensor,
    inner: Tensor,
    factor: Tensor,
    span: Span,
    scale: float,
    probability: float,
    seed: int | Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """`low_rank_up` likewise."""
    arguments = base, inner, factor, span, scale, probability, *seeded(seed), dtype, bias
    if may_launch(base) and type(factor) is Tensor:
        return up(base.is_cuda, *arguments)
    return torch.ops.spt.low_rank_up(*arguments)  # type: ignore[no-any-return]


def launch_up_(
    base: Tensor,
    inner: Tensor,
    factor: Tensor,
    span: Span,
    scale: float,
    probability: float,
    seed: int | Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """`low_rank_up_` likewise."""
    arguments = base, inner, factor, span, scale, probability, *seeded(seed), bias
    if may_launch(base) and type(factor) is Tensor:
        up_(base.is_cuda, *arguments)
    else:
        torch.ops.spt.low_rank_up_(*arguments)
    return base


def launch_grad(
    input: Tensor,
    grad_inner: Tensor,
    probability: float,
    seed: int | Tensor,
    activation: Activation = "none",
    norm: Norm = NO_NORM,
) -> Tensor:
    """`low_rank_grad` likewise."""
    arguments = input, grad_inner, probability, *seeded(seed), activation, *norm
    if may_launch(input):
        return grad(input.is_cuda, *arguments)
    return torch.ops.spt.low_rank_grad(*arguments)  # type: ignore[no-any-return]


def seeded(seed: int | Tensor) -> tuple[int, Tensor | None]:
    """A seed as the registered ops take it: a number, or a key in memory."""
    return (0, seed) if isinstance(seed, Tensor) else (seed, None)


@functools.cache
def kernels_of_a_card() -> tuple[Any, Any]:
    """The modules of the kernels: of the products, and of the gradient."""
    from ..kernels import low_rank, low_rank_grad

    return low_rank, low_rank_grad


def dropped_of(probability: float, seed: int | Tensor) -> Any:
    """What the kernels drop, of a probability below 1."""
    return _dropped(probability, *seeded(seed))


def _dropped(probability: float, seed: int, key: Tensor | None) -> Any:
    if probability == 0.0:
        return nothing_dropped()
    kernels, _ = kernels_of_a_card()
    return kernels.Dropped(_given(probability, seed, key), key)


@functools.cache
def nothing_dropped() -> Any:
    """`dropped_of` a probability of 0."""
    kernels, _ = kernels_of_a_card()
    return kernels.Dropped((0, 0, 0))


def _words(probability: float, seed: int, key: Tensor | None) -> tuple[Any, Any, int]:
    """The two words of the key and the threshold, of a probability below 1."""
    before, between, threshold = _given(probability, seed, key)
    return before if key is None else key[0], between if key is None else key[1], threshold


def _given(probability: float, seed: int, key: Tensor | None) -> tuple[int, int, int]:
    """The same as numbers, without a key that is in memory."""
    if probability == 0.0:
        return 0, 0, 0
    before, between = known_key_of(seed) if key is None else (0, 0)
    return before, between, known_threshold_of(probability)


def down(
    card: bool,
    input: Tensor,
    factor: Tensor,
    span: Any,
    scale: float,
    probability: float,
    seed: int,
    key: Tensor | None,
) -> Tensor:
    """`low_rank_down` on a CPU or a card, by its kernel there where that is for such tensors."""
    if card and _is_served(input, factor.shape[1], probability):
        kernels, _ = kernels_of_a_card()
        dropped = _dropped(probability, seed, key)
        with on_card(input.device):
            return kernels.low_rank_down(input, factor, span, scale, dropped)  # type: ignore[no-any-return]
    if probability >= 1.0:
        return input.new_zeros(input.shape[0], span[0] * factor.shape[1])
    return reference.low_rank_down(input, factor, span, scale, _words(probability, seed, key))


def up(
    card: bool,
    base: Tensor,
    inner: Tensor,
    factor: Tensor,
    span: Any,
    scale: float,
    probability: float,
    seed: int,
    key: Tensor | None,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """`low_rank_up` likewise."""
    is_served = card and _is_served(base, factor.shape[1], probability)
    if is_served and dtype is not torch.float64:
        kernels, _ = kernels_of_a_card()
        dropped = _dropped(probability, seed, key)
        output = torch.empty(base.shape, dtype=dtype, device=base.device)
        with on_card(base.device):
            tensors = base.contiguous(), output, inner, factor
            kernels.low_rank_up(*tensors, span, scale, dropped, bias)
        return output
    total = base if bias is None else base + bias
    if probability < 1.0:
        words = _words(probability, seed, key)
        total = reference.low_rank_up(base, inner, factor, span, scale, words, bias)
    return total.to(dtype, memory_format=torch.contiguous_format, copy=total is base)


def up_(
    card: bool,
    base: Tensor,
    inner: Tensor,
    factor: Tensor,
    span: Any,
    scale: float,
    probability: float,
    seed: int,
    key: Tensor | None,
    bias: Tensor | None = None,
) -> None:
    """`low_rank_up_` likewise. Its kernel leaves the version of `base`, as what was just made."""
    if card and _is_served(base, factor.shape[1], probability):
        kernels, _ = kernels_of_a_card()
        dropped = _dropped(probability, seed, key)
        with on_card(base.device):
            kernels.low_rank_up(base, base, inner, factor, span, scale, dropped, bias)
    elif probability < 1.0:
        words = _words(probability, seed, key)
        base.copy_(reference.low_rank_up(base, inner, factor, span, scale, words, bias))
    elif bias is not None:
        base.add_(bias)


def grad(
    card: bool,
    input: Tensor,
    grad_inner: Tensor,
    probability: float,
    seed: int,
    key: Tensor | None,
    activation: Any = "none",
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`low_rank_grad` likewise."""
    rank, norm = grad_inner.shape[1], (mean, rstd, weight, bias)
    is_served = card and _is_served(grad_inner, rank, probability)
    if is_served and input.dtype in MOST_COLUMNS:
        _, kernels = kernels_of_a_card()
        dropped = _dropped(probability, seed, key)
        with on_card(input.device):
            return kernels.low_rank_grad(input, grad_inner, dropped, activation, norm)  # type: ignore[no-any-return]
    if probability >= 1.0:
        wide = torch.promote_types(grad_inner.dtype, torch.float32)
        return input.new_zeros(rank, input.shape[1], dtype=wide)
    words = _words(probability, seed, key)
    return reference.low_rank_grad(input, grad_inner, words, activation, norm)


def _is_served(activations: Tensor, columns: int, probability: float) -> bool:
    return probability < 1.0 and serves(activations.dtype, columns)
