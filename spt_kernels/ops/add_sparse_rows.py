"""Sparse rows: what single changed weights add to a product, for each span of tokens its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..reference import add_sparse_rows as reference
from .dtypes import FLOATS
from .launching import check_unrecorded, mark_mutated, may_launch, register
from .write_delta import MAX_NUMEL

torch.library.define(
    "spt::add_sparse_rows",
    "(Tensor(a!) output, Tensor input, int[] starts, int[] stops, Tensor[] indices, "
    "Tensor[] befores, Tensor[] afters) -> ()",
)


def add_sparse_rows(
    output: Tensor,
    input: Tensor,
    spans: Sequence[tuple[int, int]],
    indices: Sequence[Tensor],
    befores: Sequence[Tensor],
    afters: Sequence[Tensor],
) -> None:
    """Add to `input @ weight.T` what it lacks where some weights differ, one launch for all spans.

    `output[t, row_k] += Σ_k (after_k - before_k) · input[t, column_k]` for the tokens `t` of each
    span, with its own entries `k`. Weights are rounded to the output's dtype first, as autocast
    does; the sum is taken in fp32, and rounded once, into the output.

    Args:
        output: `[tokens, out]`, mutated; fp32, bf16 or fp16, contiguous.
        input: `[tokens, in]` in the same dtype, contiguous.
        spans: half-open ranges of tokens, apart from each other.
        indices: for each span int32 `[nnz]`: sorted flat positions in `[out, in]`, in range. On a
            card this is not checked: it would cost more than the sum.
        befores: for each span `[nnz]`: the weights that the product was taken with; in fp32 or the
            output's dtype, all in one.
        afters: for each span `[nnz]` in the same dtype: those that it should have been taken with.

    Raises:
        ValueError: lengths, shapes, devices, spans or memory layout do not fit; `output` needs a
            gradient, which would be that of what it was.
        TypeError: a dtype does not fit.
    """
    _check_matrices(output, input)
    check_unrecorded("output", output)
    columns = {"indices": indices, "befores": befores, "afters": afters}
    for name, column in columns.items():
        if len(column) != len(spans):
            raise ValueError(f"{name} has {len(column)} items, expected {len(spans)}, one per span")
    last = 0
    for start, stop in sorted(spans):
        if not last <= start <= stop <= len(output):
            raise ValueError(
                f"spans must be apart and within the {len(output)} tokens, got {list(spans)}"
            )
        last = stop
    for m in range(len(spans)):
        _check_entries(m, output, indices[m], befores[m], afters[m], befores[0].dtype)
    if len(spans):
        starts, stops = ([span[i] for span in spans] for i in range(2))
        rows = list(indices), list(befores), list(afters)
        with torch.no_grad():
            torch.ops.spt.add_sparse_rows(output, input, starts, stops, *rows)


def launch_sparse_rows(output: Tensor, input: Tensor, index: Tensor, values: Tensor) -> None:
    """`add_sparse_rows` of values beside zeros for all tokens, which are known to fit.

    Past the dispatcher where nobody listens.
    """
    rows = [index], [torch.zeros_like(values)], [values]
    if may_launch(output) and index.device == values.device == output.device:
        (_cuda if output.is_cuda else _cpu)(output, input, [0], [len(output)], *rows)
    else:
        add_sparse_rows(output, input, [(0, len(output))], *rows)


def _check_matrices(output: Tensor, input: Tensor) -> None:
    for name, matrix in (("output", output), ("input", input)):
        if matrix.dtype not in FLOATS or matrix.dtype != output.dtype:
            raise TypeError(
                f"{name} must be float32, bfloat16 or float16, and both of one dtype, got "
                f"{matrix.dtype}"
            )
        if matrix.dim() != 2 or not matrix.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous matrix, got shape {tuple(matrix.shape)} with strides "
                f"{matrix.stride()}"
            )
    if len(input) != len(output) or input.device != output.device:
        raise ValueError(
            f"input must have {len(output)} tokens on {output.device}, got {len(input)} on "
            f"{input.device}"
        )
    if output.shape[1] * input.shape[1] > MAX_NUMEL:
        raise ValueError(
            f"the weight must have at most {MAX_NUMEL} elements, for positions are int32, got "
            f"{output.shape[1]}×{input.shape[1]}"
        )


def _check_entries(
    m: int, output: Tensor, index: Tensor, before: Tensor, after: Tensor, dtype: torch.dtype
) -> None:
    if index.dtype != torch.int32:
        raise TypeError(f"indices[{m}] must be torch.int32, got {index.dtype}")
    if index.dim() != 1 or not index.is_contiguous() or index.device != output.device:
        raise ValueError(
            f"indices[{m}] must be a contiguous vector on {output.device}, got shape "
            f"{tuple(index.shape)} on {index.device}"
        )
    for name, values in (("befores", before), ("afters", after)):
        if values.dtype != dtype or dtype not in (torch.float32, output.dtype):
            raise TypeError(
                f"{name}[{m}] must be float32 or {output.dtype}, and all of one dtype, got "
                f"{values.dtype}"
            )
        fits = values.shape == index.shape and values.device == index.device
        if not fits or not values.is_contiguous():
            raise ValueError(
                f"{name}[{m}] must be contiguous, of shape {tuple(index.shape)} on {index.device}, "
                f"got {tuple(values.shape)} on {values.device}"
            )


def _cpu(output: Tensor, input: Tensor, starts: list[int], stops: list[int], *rows: Any) -> None:
    backend = native if native.available() else reference
    backend.add_sparse_rows(output, input, list(zip(starts, stops, strict=True)), *rows)
    mark_mutated([output])


def _cuda(output: Tensor, input: Tensor, starts: list[int], stops: list[int], *rows: Any) -> None:
    from ..kernels import add_sparse_rows as kernels

    with torch.cuda.device_of(output):  # Triton launches on the current device
        kernels.add_sparse_rows(output, input, list(zip(starts, stops, strict=True)), *rows)
    mark_mutated([output])


register("spt::add_sparse_rows", "cpu", _cpu)
register("spt::add_sparse_rows", "cuda", _cuda)
torch.library.register_fake("spt::add_sparse_rows", lambda *arguments: None)
