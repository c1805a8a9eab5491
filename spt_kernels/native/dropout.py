"""Dropout by position in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import DTYPE_NUMBERS, check
from .module import module


def dropout(
    input: Tensor, output: Tensor, before: int, between: int, threshold: int, first: int
) -> None:
    """See `spt_kernels.reference.dropout.dropout`; contiguous floating tensors, may be the same.

    Raises:
        ValueError: a layout, dtype or length does not fit.
    """
    for name, tensor in (("input", input), ("output", output)):
        check(name, tensor, (*DTYPE_NUMBERS, torch.float64), input.numel())
    if output.dtype != input.dtype:
        raise ValueError(f"output must be {input.dtype}, got {output.dtype}")
    module().dropout(
        input.data_ptr(),
        output.data_ptr(),
        input.numel(),
        input.element_size(),
        first,
        (before, between, threshold),
        torch.get_num_threads(),
    )
