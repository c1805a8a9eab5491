"""The products of a LoRA on a card: each is one pass over an activation, dropout and all.

A library's products take a launch for each change of dtype, each factor and each dropout besides.
Of the launches of a training step more than a third were those.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.launching import goes_as_on_card, is_transformed
from ...ops.low_rank_ways import (
    NO_NORM,
    Activation,
    Norm,
    launch_down,
    launch_grad,
    launch_up,
    launch_up_,
    serves,
)
from .graph_nodes import KeptLayerNorm
from .lora_terms import LoraTerms
from .saved_input import SavedInput
from .wide_product import wide_product


def are_for(activations: Tensor, columns: int) -> bool:
    """Whether these are for such activations, and a factor of so many columns."""
    return (
        goes_as_on_card(activations) and serves(activations.dtype, columns) and not is_transformed()
    )


def bottleneck(lora: LoraTerms, flat: Tensor, lora_a: Tensor) -> Tensor:
    """A dropout(x), `[tokens, ranges · rank]`, of x `[tokens, in]`."""
    span = 1, flat.shape[1], 0, 0
    return launch_down(flat, lora_a.t(), span, lora.kept_scale, lora.dropout, lora.seed)


def add_update(
    lora: LoraTerms, flat: Tensor, inner: Tensor, lora_b: Tensor, bias: Tensor | None
) -> None:
    """Add `scale · B inner` and a bias into `[tokens, out]`."""
    for group in lora.groups:
        low, up = inner[:, group.part], lora_b[group.own]
        launch_up_(flat, low, up, group.span, lora.scale, 0.0, 0, bias)


def grad_of_inner(lora: LoraTerms, gy: Tensor, lora_b: Tensor) -> Tensor:
    """`[tokens, ranges · rank]`, with all factors."""
    scale = lora.scale * lora.kept_scale
    parts = [launch_down(gy, lora_b[group.own], group.span, scale, 0.0, 0) for group in lora.groups]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def grad_of_b(lora: LoraTerms, gy: Tensor, inner: Tensor) -> Tensor:
    """`[rows of all ranges, rank]`, fp32."""
    if lora.only is not None:
        grad = wide_product(lora.only.of_outputs_alone(gy).t(), inner)
    else:
        parts = [
            wide_product(group.of_outputs(gy).mT, group.of_bottleneck(inner)).flatten(0, 1)
            for group in lora.groups
        ]
        grad = parts[0] if len(parts) == 1 else torch.cat(parts)
    return grad if lora.scale == 1.0 else grad.mul_(lora.scale)


def grad_of_a(lora: LoraTerms, grad_inner: Tensor, flat: Tensor) -> Tensor:
    """`[ranges · rank, in]`, fp32."""
    if not lora.dropout:
        return wide_product(grad_inner.t(), flat)
    return launch_grad(flat, grad_inner, lora.dropout, lora.seed)


def grad_of_a_of_source(lora: LoraTerms, grad_inner: Tensor, saved: SavedInput) -> Tensor | None:
    """`grad_of_a` from what a GELU or a LayerNorm keeps, without its output; None of others."""
    source = source_of(saved) if are_for(grad_inner, grad_inner.shape[1]) else None
    if source is None:
        return None
    flat, activation, norm = source
    return launch_grad(flat, grad_inner, lora.dropout, lora.seed, activation, norm)


def source_of(saved: SavedInput) -> tuple[Tensor, Activation, Norm] | None:
    """What an input is made of, `[tokens, in]`, and how, where that may be done on the way."""
    kind, _, node, steps = saved
    if steps:
        return None
    if kind == "gelu":
        source, is_exact = node._saved_self, node._saved_approximate == "none"
        return source.reshape(-1, source.shape[-1]), "gelu" if is_exact else "tanh", NO_NORM
    if kind == "layer_norm":
        source, mean, rstd, weight, bias, normalized_ndim = KeptLayerNorm.of(node)
        if normalized_ndim == 1:
            norm = mean, rstd, weight, bias
            return source.reshape(-1, source.shape[-1]), "layer_norm", norm
    return None


def grad_of_x(
    lora: LoraTerms,
    gy: Tensor,
    weight: Tensor,
    grad_inner: Tensor,
    lora_a: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`[tokens, in]` in the dtype of the input, from `weight` in that of `gy`."""
    grad, low, all_of_x = torch.mm(gy, weight), lora_a.t(), (1, lora_a.shape[1], 0, 0)
    if dtype is grad.dtype:
        return launch_up_(grad, grad_inner, low, all_of_x, 1.0, lora.dropout, lora.seed)
    return launch_up(grad, grad_inner, low, all_of_x, 1.0, lora.dropout, lora.seed, dtype)
