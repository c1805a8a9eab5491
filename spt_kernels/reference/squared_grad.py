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
    score: Tensor,
    grad_output: Tensor,
    input: Tensor | None,
    scale: float,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    bias_score: Tensor | None = None,
) -> None:
    """`score[c] += Σ_b (scale Σ_t grad_output[b, t, c] (input[b, t, c] - mean) rstd)²`."""
    product = grad_output
    if input is not None:
        input = input.float()
        if mean is not None and rstd is not None:
            input = (input - mean[..., None]) * rstd[..., None]
        product = grad_output.float() * input
    _add_squares(score, product, scale)
    if bias_score is not None:
        _add_squares(bias_score, grad_output, scale)


def _add_squares(score: Tensor, product: Tensor, scale: float) -> None:
    squares = (scale * product.sum(1, dtype=torch.float32)).square_()  # [samples, channels]
    if score.dim() == 1 or score.shape[0] == 1:
        score += squares.sum(0)
        return
    for row, own in enumerate(score):
        own += squares[row :: len(score)].sum(0)
