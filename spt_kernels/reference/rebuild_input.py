"""The plain computation of `ops.rebuild_input`, which says what its kernels must give."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rebuild_layer_norm(
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    dtype: torch.dtype,
) -> Tensor:
    """`(input - mean) · rstd · weight + bias` in fp32, rounded as the forward rounded."""
    statistics = input.shape[: input.dim() - normalized_ndim] + (1,) * normalized_ndim
    # the order of ATen's forward, from which it can differ by contraction to FMA alone
    y = input.float().contiguous() - mean.reshape(statistics).float()
    y *= rstd.reshape(statistics).float()
    if weight is not None:
        y *= weight.float()
    if bias is not None:
        y += bias.float()
    return y.to(input.dtype).to(dtype)


def rebuild_gelu(input: Tensor, approximate: str, dtype: torch.dtype) -> Tensor:
    """`x Φ(x)`, or its tanh approximation, rounded as the forward rounded."""
    y = F.gelu(input, approximate=approximate, out=torch.empty_like(input))  # type: ignore[call-arg]
    return y if y.dtype is dtype else y.to(dtype)
