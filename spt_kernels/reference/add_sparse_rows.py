"""Changes of single weights applied to the outputs of a product that did not have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def add_sparse_rows(
    output: Tensor,
    input: Tensor,
    spans: Sequence[tuple[int, int]],
    indices: Sequence[Tensor],
    befores: Sequence[Tensor],
    afters: Sequence[Tensor],
) -> None:
    """See `spt_kernels.ops.add_sparse_rows.add_sparse_rows`."""
    n_out, n_in = output.shape[1], input.shape[1]
    for (start, stop), index, before, after in zip(spans, indices, befores, afters, strict=True):
        change = torch.zeros(n_out * n_in, dtype=torch.float32, device=output.device)
        change[index.long()] = after.to(output.dtype).float() - before.to(output.dtype).float()
        added = input[start:stop].float() @ change.view(n_out, n_in).t()  # [tokens, out] fp32
        touched = (index.long() // n_in).unique()
        rows = output[start:stop]
        rows[:, touched] = (rows[:, touched].float() + added[:, touched]).to(output.dtype)
