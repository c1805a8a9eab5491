"""Squared gradients in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import DTYPE_NUMBERS, check_matrix, check_samples
from .module import module


def accumulate_squared_grad(
    score: Tensor, grad_output: Tensor, input: Tensor, scale: float
) -> None:
    """See `spt_kernels.ops.squared_grad.accumulate_squared_grad`; `score` is mutated.

    Args:
        score: fp32 `[out_features, in_features]`; rows may be any distance apart.
        grad_output: `[samples, tokens, out_features]`, fp32, bf16 or fp16; any strides.
        input: `[samples, tokens, in_features]`, likewise.
        scale: factor on each sample's gradient before it is squared.

    Raises:
        ValueError: a layout, dtype or length does not fit.
    """
    check_matrix("score", score, (torch.float32,))
    check_samples("grad_output", grad_output, score.shape[0])
    check_samples("input", input, score.shape[1])
    if input.shape[:2] != grad_output.shape[:2]:
        raise ValueError(
            f"input must have {tuple(grad_output.shape[:2])} samples and tokens, got "
            f"{tuple(input.shape[:2])}"
        )
    module().accumulate_squared_grad(
        score.data_ptr(),
        score.stride(0),
        (*grad_output.shape, score.shape[1]),
        *((t.data_ptr(), DTYPE_NUMBERS[t.dtype], t.stride()) for t in (grad_output, input)),
        scale,
        torch.get_num_threads(),
    )
