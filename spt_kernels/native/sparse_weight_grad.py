"""The sparse weight gradient in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import ITSELF, Activation
from .layout import DTYPE_NUMBERS, check, check_matrix
from .module import module


class WeightGradPlan:
    """The entries of an index sorted into work, for any number of inputs.

    Up to eight bytes an entry are held; the index is not needed any more. It is checked here;
    `run` trusts its caller.

    Args:
        index: int32 `[nnz]`, flat positions in `[out_features, in_features]`.
        out_features: width of the gradient of the output.
        in_features: width of the input.

    Raises:
        ValueError: the index is of another layout or dtype, or a position is out of range.
    """

    def __init__(self, index: Tensor, out_features: int, in_features: int) -> None:
        check("index", index, (torch.int32,))
        self._nnz = index.numel()
        plan = module().WeightGradPlan(
            out_features, in_features, index.data_ptr(), self._nnz, torch.get_num_threads()
        )
        self._run = plan.run
        self._like = index.view(torch.float32)  # a gradient is such a vector, sooner told so

    def run(
        self,
        grad_output: Tensor,
        input: Tensor,
        tokens: int,
        strides: tuple[int, int],
        activation: Activation = ITSELF,
    ) -> Tensor:
        """The gradient of what is known to have its layouts, dtypes and lengths: none is checked.

        Args:
            grad_output: `[..., out_features]`, fp32, bf16 or fp16; features lie side by side.
            input: `[..., in_features]`, likewise.
            tokens: how many each has.
            strides: elements from token to token of the two.
            activation: what the weight was multiplied with, if that is not `input` itself; its
                tensors are held by whoever calls.

        Returns:
            fp32 `[nnz]`, summed in fp32.
        """
        grad = torch.empty_like(self._like)
        self._run(
            tokens,
            grad_output.data_ptr(),
            DTYPE_NUMBERS[grad_output.dtype],
            strides[0],
            input.data_ptr(),
            DTYPE_NUMBERS[input.dtype],
            strides[1],
            *activation,
            grad.data_ptr(),
            torch.get_num_threads(),
        )
        return grad


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
    plan = WeightGradPlan(index, grad_output.shape[1], input.shape[1])
    strides = grad_output.stride(0), input.stride(0)
    return plan.run(grad_output, input, len(input), strides)


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
