"""The op that computes a layer's input a second time, from what LayerNorm or GELU already kept.

A linear layer that follows a LayerNorm or a GELU need not save its input for the backward pass: the
autograd graph holds the producer's input (and statistics) anyway, and one elementwise pass over it
gives the activation back.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import native
from ..reference import rebuild_input as reference
from .dtypes import FLOATS
from .launching import on_card, register


def rebuild_layer_norm(
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    dtype: torch.dtype,
) -> Tensor:
    """What `F.layer_norm` returned, from its input and the statistics that its backward keeps.

    Computed in fp32 and rounded once to the dtype of `input`, as the forward does: what is rebuilt
    differs from the forward's value by an fp32 rounding at most. (ATen's CPU forward keeps the
    statistics of a wholly bf16 or fp16 LayerNorm in that dtype; there it is a rounding of that.)

    Args:
        input: `[..., *normalized]`, fp32, bf16 or fp16; any strides.
        mean: one per row, `_saved_result1` of the autograd node.
        rstd: one per row, `_saved_result2`.
        weight: `[*normalized]`, or None.
        bias: `[*normalized]`, or None.
        normalized_ndim: how many trailing dimensions are normalized.
        dtype: of the result: another than that of `input` where autocast had cast the activation.

    Returns:
        Contiguous tensor of the shape of `input`.

    Raises:
        TypeError: a dtype is not one of fp32, bf16, fp16.
        ValueError: a shape does not fit.
    """
    _require_floats(dtype, input, mean=mean, rstd=rstd, weight=weight, bias=bias)
    if not 1 <= normalized_ndim <= input.dim():
        raise ValueError(
            f"normalized_ndim: expected 1 to {input.dim()}, the dimensions of input, "
            f"got {normalized_ndim}"
        )
    rows = input.shape[: input.dim() - normalized_ndim].numel()
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        if statistic.numel() != rows:
            raise ValueError(
                f"{name}: expected {rows} values, one per row, got {statistic.numel()}"
            )
    normalized = input.shape[input.dim() - normalized_ndim :]
    for name, affine in (("weight", weight), ("bias", bias)):
        if affine is not None and affine.shape != normalized:
            raise ValueError(
                f"{name}: expected shape {tuple(normalized)}, got {tuple(affine.shape)}"
            )
    return torch.ops.spt.rebuild_layer_norm(input, mean, rstd, weight, bias, normalized_ndim, dtype)


def rebuild_gelu(input: Tensor, approximate: str, dtype: torch.dtype) -> Tensor:
    """What `F.gelu` returned, from its input.

    Args:
        input: any shape and strides, fp32, bf16 or fp16.
        approximate: `"none"` or `"tanh"`, as `F.gelu` was called.
        dtype: of the result: another than that of `input` where autocast had cast the activation.

    Returns:
        Tensor of the shape, and where they are dense the strides, of `input`.

    Raises:
        TypeError: a dtype is not one of fp32, bf16, fp16.
        ValueError: `approximate` is neither of its two values.
    """
    _require_floats(dtype, input)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")
    return torch.ops.spt.rebuild_gelu(input, approximate, dtype)


def _require_floats(dtype: torch.dtype, input: Tensor, **others: Tensor | None) -> None:
    for name, tensor in {"input": input, **others}.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name}: expected fp32, bf16 or fp16, got {tensor.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"{name}: expected device {input.device}, got {tensor.device}")
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected fp32, bf16 or fp16, got {dtype}")


torch.library.define(
    "spt::rebuild_layer_norm",
    "(Tensor input, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    "int normalized_ndim, ScalarType dtype) -> Tensor",
)
torch.library.define(
    "spt::rebuild_gelu", "(Tensor input, str approximate, ScalarType dtype) -> Tensor"
)


def launch_layer_norm(
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    dtype: torch.dtype,
) -> Tensor:
    """`rebuild_layer_norm` of what one LayerNorm keeps, on a CPU or a card."""
    if not input.is_cpu:
        with on_card(input.device):
            return _kernels().rebuild_layer_norm(  # type: ignore[no-any-return]
                input, mean, rstd, weight, bias, normalized_ndim, dtype
            )
    if (
        input.dtype is mean.dtype is rstd.dtype is torch.float32
        and (weight is None or (weight.dtype is torch.float32 and weight.is_contiguous()))
        and (bias is None or (bias.dtype is torch.float32 and bias.is_contiguous()))
        and (n_rows := mean.numel())
        and input.is_contiguous()
        and mean.is_contiguous()
        and rstd.is_contiguous()
        and native.available()
    ):
        output = torch.empty_like(input, dtype=dtype)
        n_columns = input.numel() // n_rows
        native.launch_rebuild_layer_norm(input, mean, rstd, weight, bias, output, n_rows, n_columns)
        return output
    return reference.rebuild_layer_norm(input, mean, rstd, weight, bias, normalized_ndim, dtype)


def launch_gelu(input: Tensor, approximate: str, dtype: torch.dtype) -> Tensor:
    """`rebuild_gelu` without its checks, for a tensor on a CPU or a card."""
    if input.dtype is dtype:
        return F.gelu(input, approximate=approximate)  # the very call of the forward
    if input.is_cpu:
        return reference.rebuild_gelu(input, approximate, dtype)
    with on_card(input.device):
        return _kernels().rebuild_gelu(input, approximate, dtype)  # type: ignore[no-any-return]


@functools.cache
def _kernels() -> Any:
    """The kernels of a card, imported where there is one; to ask for them again costs nothing."""
    from ..kernels import rebuild_input

    return rebuild_input


def layer_norm_of_the_op(
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    dtype: torch.dtype,
) -> Tensor:
    """The same for those who call `torch.ops.spt` themselves: raw pointers are read in it."""
    shape = input.shape
    n_rows, width = shape[:-normalized_ndim].numel(), shape[-normalized_ndim:].numel()
    affine = [tensor.numel() for tensor in (weight, bias) if tensor is not None]
    if not mean.numel() == rstd.numel() == n_rows or affine != [width] * len(affine):
        # the public function says what does not fit
        return rebuild_layer_norm(input, mean, rstd, weight, bias, normalized_ndim, dtype)
    return launch_layer_norm(input, mean, rstd, weight, bias, normalized_ndim, dtype)


for _device in ("cpu", "cuda"):
    register("spt::rebuild_layer_norm", _device, layer_norm_of_the_op)
    register("spt::rebuild_gelu", _device, launch_gelu)


@torch.library.register_fake("spt::rebuild_layer_norm")
def _rebuild_layer_norm_fake(input: Tensor, *others: Any) -> Tensor:
    *_, dtype = others
    return torch.empty(input.shape, dtype=dtype, device=input.device)


@torch.library.register_fake("spt::rebuild_gelu")
def _rebuild_gelu_fake(input: Tensor, approximate: str, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(input, dtype=dtype)
