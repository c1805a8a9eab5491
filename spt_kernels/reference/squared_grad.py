"""The plain computation of `ops.squared_grad`, which says what its kernels must give."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_squared_grad(
    score: Tensor, grad_output: Tensor, input: Tensor, scale: float
) -> None:
    """`score[o, i] += Σ_b (scale Σ_t grad_output[b, t, o] input[b, t, i])²`, a sample at a time."""
    gradient = torch.empty_like(score)  # [out, in], of one sample: never of the whole batch
    for sample_grad_output, sample_input in zip(grad_output, input, strict=True):
        torch.mm(sample_grad_output.T.float(), sample_input.float(), out=gradient)
        score.addcmul_(gradient, gradient, value=scale**2)


def accumulate_squared_vector_grad(
    score: Tensor, grad_output: Tensor, input: Tensor | None, scale: float
) -> None:
    """`score[c] += Σ_b (scale Σ_t grad_output[b, t, c] input[b, t, c])²`; no input means ones."""
    if input is None:
        gradients = grad_output.sum(1, dtype=torch.float32)  # [samples, channels]
    else:
        gradients = (grad_output.float() * input.float()).sum(1)
    score += (scale * gradients).square_().sum(0)
