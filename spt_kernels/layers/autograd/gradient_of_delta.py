"""The gradient of a sparse delta from what its layer, or the producer before it, keeps."""

from __future__ import annotations

from torch import Tensor

from ...ops.launching import may_launch
from ...ops.native_calls import DTYPE_NUMBERS
from ...ops.sparse_weight_grad import SparsePattern
from .packed_input import packed_input
from .saved_input import SavedInput, Tensors
from .sparse_gradient import eager_sparse_gradient


def gradient_of_delta(
    grad_output: Tensor, saved: SavedInput, kept: Tensors, pattern: SparsePattern
) -> Tensor:
    """`eager_sparse_gradient` of the input that was saved, `[nnz]`.

    On a CPU a GELU or a LayerNorm is done while the columns that the entries need are packed for
    the products: the input is never in memory, and no element of it made that nobody reads.

    Args:
        grad_output: `[..., out]`, in the dtype of the layer's computation.
        saved: of the layer's forward.
        kept: what it has saved itself.
        pattern: the entries.
    """
    if grad_output.is_cpu and may_launch(grad_output) and grad_output.is_contiguous():
        packed = packed_gradient(grad_output, saved, kept, pattern)
        if packed is not None:
            return packed
    gy = grad_output.reshape(-1, pattern.out_features)  # [tokens, out]
    return eager_sparse_gradient(gy, saved.rebuild(kept), pattern)


def packed_gradient(
    grad_output: Tensor, saved: SavedInput, kept: Tensors, pattern: SparsePattern
) -> Tensor | None:
    """That by the C++, of a contiguous gradient on a CPU; None where it is not for such entries."""
    plan = pattern.native_plan()
    if plan is None or grad_output.dtype not in DTYPE_NUMBERS:
        return None
    wide, width = pattern.out_features, pattern.in_features
    tokens = grad_output.numel() // wide
    packed = packed_input(saved, kept, tokens, width)
    if packed is None:
        return None
    source, activation, _ = packed
    return plan.run(grad_output, source, tokens, (wide, width), activation)
