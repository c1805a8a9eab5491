"""The sum over changed weights in C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import DTYPE_NUMBERS, check
from .module import module


def add_sparse_rows(
    output: Tensor,
    input: Tensor,
    spans: Sequence[tuple[int, int]],
    indices: Sequence[Tensor],
    befores: Sequence[Tensor],
    afters: Sequence[Tensor],
) -> None:
    """See `spt_kernels.ops.add_sparse_rows.add_sparse_rows`; `output` is mutated.

    Raises:
        ValueError: a layout, dtype or length does not fit, or a position is out of range. Nothing
            has been added then.
    """
    check("output", output, tuple(DTYPE_NUMBERS))
    check("input", input, (output.dtype,), len(output) * input.shape[1])
    dtype = befores[0].dtype if befores else output.dtype
    rows = []
    for i, (span, *entries) in enumerate(zip(spans, indices, befores, afters, strict=True)):
        index, before, after = entries
        check(f"indices[{i}]", index, (torch.int32,))
        check(f"befores[{i}]", before, (dtype,), index.numel())
        check(f"afters[{i}]", after, (dtype,), index.numel())
        if not 0 <= span[0] <= span[1] <= len(output):
            raise ValueError(f"spans[{i}] must lie in the {len(output)} tokens, got {span}")
        rows.append((*span, index.numel(), *(tensor.data_ptr() for tensor in entries)))
    module().add_sparse_rows(
        output.data_ptr(),
        input.data_ptr(),
        (output.shape[1], input.shape[1]),
        (DTYPE_NUMBERS[output.dtype], DTYPE_NUMBERS[dtype]),
        rows,
        torch.get_num_threads(),
    )
