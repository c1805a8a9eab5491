"""The sparse weight gradient in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import DTYPE_NUMBERS, check, check_matrix
from .module import module


def sparse_weight_grad(grad_output: Tensor, input: Tensor, index: Tensor) -> Tensor:
    """See `spt_kernels.ops.sparse_weight_grad.sparse_weight_grad`.

    Args:
        grad_output: `[tokens, out_features]`, fp32, bf16 or fp16; rows may be any distance apart.
        input: `[tokens, in_features]`, likewise.
        index: int32 `[nnz]`, flat positions in `[out_features, in_features]`.

    Returns:
        fp32 `[nnz]`, summed in fp32.

    Raises:
        ValueError: a layout, dtype or length does not fit, or a position is out of range.
    """
    check_matrix("grad_output", grad_output)
    check_matrix("input", input)
    if len(input) != len(grad_output):
        raise ValueError(f"input must have {len(grad_output)} tokens, got {len(input)}")
    check("index", index, (torch.int32,))
    return launch(grad_output, input, index)


def launch(grad_output: Tensor, input: Tensor, index: Tensor) -> Tensor:
    """`sparse_weight_grad` of what is known to have its layouts, dtypes and lengths."""
    (tokens, n_out), n_in, nnz = grad_output.shape, input.shape[1], index.shape[0]
    grad = torch.empty(nnz, dtype=torch.float32, device="cpu")
    module().sparse_weight_grad(
        (tokens, n_out, n_in),
        (grad_output.data_ptr(), DTYPE_NUMBERS[grad_output.dtype], grad_output.stride(0), n_out),
        (input.data_ptr(), DTYPE_NUMBERS[input.dtype], input.stride(0), n_in),
        index.data_ptr(),
        nnz,
        grad.data_ptr(),
        torch.get_num_threads(),
    )
    return grad


def sample_block(
    cells: Tensor,
    corner: tuple[int, int],
    index: Tensor,
    row_begin: Tensor,
    next_of_row: Tensor,
    grad: Tensor,
    in_features: int,
) -> None:
    """Take the entries that lie in one block of a dense weight gradient.

    Args:
        cells: fp32 `[rows, columns]`, the block.
        corner: its first row and column in the whole gradient.
        index: int32 `[nnz]`, ascending flat positions in `[out_features, in_features]`.
        row_begin: int32 `[out_features + 1]`, the number of entries before each row.
        next_of_row: int32 `[out_features]`, each row's first entry that was not taken yet: a copy
            of `row_begin[:-1]` at first. Moved on, so blocks must come from left to right.
        grad: fp32 `[nnz]`, into which the entries are written.
        in_features: columns of the whole gradient.

    Raises:
        ValueError: a layout, dtype or length does not fit, or an entry is not where it should be.
    """
    check("cells", cells, (torch.float32,))
    check("index", index, (torch.int32,))
    check("row_begin", row_begin, (torch.int32,))
    check("next_of_row", next_of_row, (torch.int32,), row_begin.numel() - 1)
    check("grad", grad, (torch.float32,), index.numel())
    if corner[0] + cells.shape[0] > next_of_row.numel() or corner[1] + cells.shape[1] > in_features:
        raise ValueError(
            f"cells must lie in the {next_of_row.numel()}×{in_features} gradient, got shape "
            f"{tuple(cells.shape)} at {corner}"
        )
    module().sample_block(
        cells.data_ptr(),
        corner,
        tuple(cells.shape),
        in_features,
        index.data_ptr(),
        row_begin.data_ptr(),
        next_of_row.data_ptr(),
        grad.data_ptr(),
        torch.get_num_threads(),
    )
