"""What the ops of a low-rank update run where.

On a card the kernels, which hold a row of a factor in registers: of up to 32 columns in fp32, of 64
in 16 bits (`MOST_COLUMNS`). Of more columns, of fp64, and where all is dropped (a probability of 1)
a card runs the reference, as a CPU does of everything. What a CPU has in C++ is for whole calls of
a layer (`native.low_rank`), and no op.

Layers launch from here, past the dispatcher; the registered ops (`low_rank`) are for people,
compilers and whoever listens.
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
        return (down_on_card if input.is_cuda else down)(*arguments)
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
        return (up_on_card if base.is_cuda else up)(*arguments)
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
        (up_in_place_on_card if base.is_cuda else up_in_place)(*arguments)
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
        return (grad_on_card if input.is_cuda else grad)(*arguments)
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
        return _nothing()
    kernels, _ = kernels_of_a_card()
    return kernels.Dropped(_given(probability, seed, key), key)


@functools.cache
def _nothing() -> Any:
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
    input: Tensor,
    factor: Tensor,
    span: Any,
    scale: float,
    probability: float,
    seed: int,
    key: Tensor | None,
) -> Tensor:
    """`low_rank_down` by the reference."""
    if probability >= 1.0:
        return input.new_zeros(input.shape[0], span[0] * factor.shape[1])
    return reference.low_rank_down(input, factor, span, scale, _words(probability, seed, key))


def down_on_card(*given: Any) -> Tensor:
    """What `down` is given, by the kernel of `low_rank_down` where that is for such tensors."""
    input, factor, span, scale, *mask = given
    if not _is_served(input, factor.shape[1], mask[0]):
        return down(*given)
    kernels, _ = kernels_of_a_card()
    with on_card(input.device):
        made = kernels.low_rank_down(input, factor, span, scale, _dropped(*mask))
    return made  # type: ignore[no-any-return]


def up(
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
    """`low_rank_up` by the reference."""
    total = base if bias is None else base + bias
    if probability < 1.0:
        words = _words(probability, seed, key)
        total = reference.low_rank_up(base, inner, factor, span, scale, words, bias)
    return total.to(dtype, memory_format=torch.contiguous_format, copy=total is base)


def up_on_card(*given: Any) -> Tensor:
    """What `up` is given, likewise."""
    base, inner, factor, span, scale, *mask, dtype = given[:9]
    if dtype is torch.float64 or not _is_served(base, factor.shape[1], mask[0]):
        return up(*given)
    kernels, _ = kernels_of_a_card()
    output = torch.empty(base.shape, dtype=dtype, device=base.device)
    with on_card(base.device):
        tensors = base.contiguous(), output, inner, factor
        kernels.low_rank_up(*tensors, span, scale, _dropped(*mask), *given[9:])  # and a bias
    return output


def up_in_place(
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
    """`low_rank_up_` by the reference."""
    if probability < 1.0:
        words = _words(probability, seed, key)
        base.copy_(reference.low_rank_up(base, inner, factor, span, scale, words, bias))
    elif bias is not None:
        base.add_(bias)


def up_in_place_on_card(*given: Any) -> None:
    """What `up_in_place` is given, likewise; for what has just been made: it has no version."""
    base, inner, factor, span, scale, probability, seed, key, *bias = given
    if not _is_served(base, factor.shape[1], probability):
        up_in_place(*given)
        return
    kernels, _ = kernels_of_a_card()
    dropped = _dropped(probability, seed, key)
    with on_card(base.device):
        kernels.low_rank_up(base, base, inner, factor, span, scale, dropped, *bias)


def grad(
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
    """`low_rank_grad` by the reference."""
    if probability >= 1.0:
        wide = torch.promote_types(grad_inner.dtype, torch.float32)
        return input.new_zeros(grad_inner.shape[1], input.shape[1], dtype=wide)
    words, norm = _words(probability, seed, key), (mean, rstd, weight, bias)
    return reference.low_rank_grad(input, grad_inner, words, activation, norm)


def grad_on_card(
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
    """`low_rank_grad` by its kernel, likewise."""
    is_served = _is_served(grad_inner, grad_inner.shape[1], probability)
    if not (is_served and input.dtype in MOST_COLUMNS):
        norm = mean, rstd, weight, bias
        return grad(input, grad_inner, probability, seed, key, activation, *norm)
    _, kernels = kernels_of_a_card()
    dropped = _dropped(probability, seed, key)
    norm = mean, rstd, weight, bias
    with on_card(input.device):
        return kernels.low_rank_grad(input, grad_inner, dropped, activation, norm)


def _is_served(activations: Tensor, columns: int, probability: float) -> bool:
    return probability < 1.0 and serves(activations.dtype, columns)
