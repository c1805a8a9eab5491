"""The plain computation of `ops.sparse_weight_grad`, which says what its kernels must give."""

from __future__ import annotations

import torch
from torch import Tensor

# one block of the product is at most this large (4 MiB), and spans at most so many tokens
_BLOCK_NUMEL = 2**20
_BLOCK_TOKENS = 4096


def sparse_weight_grad(grad_output: Tensor, input: Tensor, index: Tensor) -> Tensor:
    """`g[k] = Σ_t grad_output[t, row_k] · input[t, column_k]`, `index = row · in + column`.

    Blocks of the rows and columns that occur are multiplied and sampled; the whole weight gradient
    is never in memory.
    """
    n_in = input.shape[1]
    result = torch.zeros_like(index, dtype=torch.float32)  # [nnz]
    rows, row_ranks = torch.unique(index // n_in, return_inverse=True)
    columns, column_ranks = torch.unique(index % n_in, return_inverse=True)
    block_rows = max(1, _BLOCK_NUMEL // max(1, len(columns)))
    for first in range(0, len(rows), block_rows):
        block = rows[first : first + block_rows]
        entries = ((row_ranks >= first) & (row_ranks < first + block_rows)).nonzero().squeeze(1)
        places = row_ranks[entries] - first, column_ranks[entries]
        for some_grad, some_input in zip(
            grad_output.split(_BLOCK_TOKENS), input.split(_BLOCK_TOKENS), strict=True
        ):
            product = some_grad[:, block].float().T @ some_input[:, columns].float()
            result[entries] += product[places]
    return result
