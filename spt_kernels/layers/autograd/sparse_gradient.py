"""The gradient of a sparse delta of a linear map, from its input and its output's gradient."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.launching import may_launch
from ...ops.sparse_weight_grad import SparsePattern, launch, sparse_weight_grad
from .wide_product import gives_fp32, wide_product


@dataclass(frozen=True, eq=False)
class DeltaPattern:
    """Where the entries of a delta lie, prepared for whole inputs and for their columns alone.

    Attributes:
        whole: for an input with all of its features.
    """

    whole: SparsePattern

    @classmethod
    def of(cls, index: Tensor, out_features: int, in_features: int) -> DeltaPattern:
        """Prepare an index."""
        return cls(SparsePattern.build(index, out_features, in_features))

    @property
    def columns(self) -> Tensor:
        """int32 `[n_cols]`, sorted: all of the input that the gradient needs."""
        return self.whole.columns

    @property
    def input_share(self) -> float:
        """Share of the input's features that `columns` are."""
        return self.columns.numel() / self.whole.in_features

    @functools.cached_property
    def compacted(self) -> SparsePattern:
        """For an input of which only `columns` were kept."""
        return self.whole.compacted()


def sparse_gradient(grad_output: Tensor, input: Tensor, pattern: SparsePattern) -> Tensor:
    """`g[k] = Σ_t grad_output[t, row_k] · input[t, column_k]`, `[nnz]`.

    Args:
        grad_output: `[tokens, out]`.
        input: `[..., in]` in the same dtype, as wide as the pattern says.
        pattern: the entries.
    """
    if not torch.compiler.is_compiling():
        return eager_sparse_gradient(grad_output, input, pattern)
    flat = input.reshape(-1, pattern.in_features)
    if gives_fp32(grad_output):
        # what a compiler knows needs no host: of 16 bits the whole product costs a card little more
        return wide_product(grad_output.t(), flat).flatten().index_select(0, pattern.index)
    return _by_the_op(grad_output, flat, pattern)


def eager_sparse_gradient(grad_output: Tensor, input: Tensor, pattern: SparsePattern) -> Tensor:
    """`sparse_gradient` of a backward, which compiled autograd may trace."""
    flat = input.reshape(-1, pattern.in_features)
    if (
        may_launch(flat)
        and type(grad_output) is Tensor
        and grad_output.dtype is not torch.float64
        and not grad_output.is_neg()
    ):
        return launch(grad_output, flat, pattern)
    return _by_the_op(grad_output, flat, pattern)


def _by_the_op(grad_output: Tensor, flat: Tensor, pattern: SparsePattern) -> Tensor:
    if grad_output.dtype == torch.float64:
        # The op serves the dtypes that are trained in; float64 models exist to check gradients with
        return (grad_output.t() @ flat).flatten().index_select(0, pattern.index)
    return sparse_weight_grad(grad_output, flat, pattern)
