"""The output of a LayerNorm made again in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import DTYPE_NUMBERS, check
from .module import module

_FP32 = (torch.float32,)


def rebuild_layer_norm(
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor,
) -> None:
    """See `spt_kernels.reference.rebuild_input.rebuild_layer_norm`.

    Args:
        input: fp32, contiguous, as all of them; its trailing dimensions are normalized.
        mean: fp32, one per row of the input.
        rstd: fp32, likewise.
        weight: fp32, one per column; or None.
        bias: fp32, likewise.
        output: as many elements as `input`, in fp32, bf16 or fp16; is written.

    Raises:
        ValueError: a layout, dtype or length does not fit.
    """
    n_rows = mean.numel()
    n_columns = input.numel() // n_rows if n_rows else 0
    check("input", input, _FP32, n_rows * n_columns)
    check("mean", mean, _FP32)
    check("rstd", rstd, _FP32, n_rows)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and n_rows:
            check(name, tensor, _FP32, n_columns)
    check("output", output, tuple(DTYPE_NUMBERS), input.numel())
    launch(input, mean, rstd, weight, bias, output, n_rows, n_columns)


def launch(
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor,
    n_rows: int,
    n_columns: int,
) -> None:
    """`rebuild_layer_norm` of what is known to have its layouts: nothing is checked."""
    module().rebuild_layer_norm(
        input.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        output.data_ptr(),
        DTYPE_NUMBERS[output.dtype],
        n_rows,
        n_columns,
        torch.get_num_threads(),
    )
