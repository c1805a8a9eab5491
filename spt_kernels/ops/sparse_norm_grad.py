"""The op of chosen entries of the gradients of a LayerNorm's weight and bias."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..reference import sparse_norm_grad as reference
from .dtypes import FLOATS
from .launching import may_launch, on_card, register


def sparse_norm_grad(
    grad_output: Tensor,
    input: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight_index: Tensor | None,
    bias_index: Tensor | None,
) -> Tensor:
    """Entries of the gradients of a LayerNorm's weight and bias; no other is computed.

    `Σ_t g_tc (x_tc - mean_t) rstd_t` for the channels c in `weight_index`, and `Σ_t g_tc` for those
    in `bias_index`; these, alone, are also those of the bias of any layer.

    Args:
        grad_output: `[tokens, channels]`, fp32, bf16 or fp16.
        input: of the LayerNorm, `[tokens, channels]`, fp32, bf16 or fp16; None, like both that
            follow, where `weight_index` is None.
        mean: one per token, as the forward gave it.
        rstd: one per token, reciprocal standard deviation.
        weight_index: int32 `[n_weights]`, channels; one that the input has not gives NaN. None for
            no entries.
        bias_index: int32 `[n_biases]`, the same of the bias.

    Returns:
        fp32 `[n_weights + n_biases]`, those of the weight first.

    Raises:
        TypeError: a dtype is not one of those.
        ValueError: a shape or a device does not fit.
    """
    of_norm = {"input": input, "mean": mean, "rstd": rstd}
    missing = [name for name, tensor in of_norm.items() if tensor is None]
    if weight_index is not None and missing:
        raise ValueError(f"{missing[0]}: expected a tensor where weight_index is one, got None")
    floats = {n: t for n, t in {"grad_output": grad_output, **of_norm}.items() if t is not None}
    given = {"weight_index": weight_index, "bias_index": bias_index}
    indices = {name: index for name, index in given.items() if index is not None}
    for name, tensor in floats.items():
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name}: expected fp32, bf16 or fp16, got {tensor.dtype}")
    for name, index in indices.items():
        if index.dtype != torch.int32:
            raise TypeError(f"{name}: expected int32, got {index.dtype}")
        if index.dim() != 1:
            raise ValueError(f"{name}: expected one dimension, got shape {tuple(index.shape)}")
    shape, device = tuple(grad_output.shape), grad_output.device
    if len(shape) != 2:
        raise ValueError(f"grad_output: expected [tokens, channels], got shape {shape}")
    if input is not None and tuple(input.shape) != shape:
        raise ValueError(
            f"input: expected shape {shape}, that of grad_output, got {tuple(input.shape)}"
        )
    for name in ("mean", "rstd"):
        if name in floats and floats[name].numel() != shape[0]:
            raise ValueError(
                f"{name}: expected {shape[0]} values, one per row, got {floats[name].numel()}"
            )
    for name, tensor in {**floats, **indices}.items():
        if tensor.device != device:
            raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
    return torch.ops.spt.sparse_norm_grad(  # type: ignore[no-any-return]
        grad_output, input, mean, rstd, weight_index, bias_index
    )


def launch_sparse_norm_grad(grad_output: Tensor, *others: Tensor | None) -> Tensor:
    """`sparse_norm_grad` without its checks, past the dispatcher where nobody listens."""
    if may_launch(grad_output):
        return (_on_card if grad_output.is_cuda else _on_cpu)(grad_output, *others)
    return torch.ops.spt.sparse_norm_grad(grad_output, *others)  # type: ignore[no-any-return]


def _on_cpu(*given: Any) -> Tensor:
    return reference.sparse_norm_grad(*given)


def _on_card(*given: Any) -> Tensor:
    dense: list[Any] = [each if each is None else each.contiguous() for each in given]
    with on_card(given[0].device):
        return _kernels().sparse_norm_grad(*dense)  # type: ignore[no-any-return]


@functools.cache
def _kernels() -> Any:
    """The kernels of a card, imported where there is one; to ask for them again costs nothing."""
    from ..kernels import sparse_norm_grad

    return sparse_norm_grad


torch.library.define(
    "spt::sparse_norm_grad",
    "(Tensor grad_output, Tensor? input, Tensor? mean, Tensor? rstd, Tensor? weight_index, "
    "Tensor? bias_index) -> Tensor",
)
register("spt::sparse_norm_grad", "cpu", _on_cpu)
register("spt::sparse_norm_grad", "cuda", _on_card)


@torch.library.register_fake("spt::sparse_norm_grad")
def _fake(grad_output: Tensor, *others: Any) -> Tensor:
    n_entries = sum(index.shape[0] for index in others[-2:] if index is not None)
    return grad_output.new_empty(n_entries, dtype=torch.float32)
