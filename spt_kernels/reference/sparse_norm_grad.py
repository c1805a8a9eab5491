"""The plain computation of `ops.sparse_norm_grad`, which says what its kernel must give."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_norm_grad(
    grad_output: Tensor,
    input: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight_index: Tensor | None,
    bias_index: Tensor | None,
) -> Tensor:
    """`Σ_t g_tc (x_tc - mean_t) rstd_t` of the weight's entries, `Σ_t g_tc` of the bias's."""
    wide = torch.promote_types(grad_output.dtype, torch.float32)
    sums = []
    if weight_index is not None:
        assert input is not None
        assert mean is not None
        assert rstd is not None
        centered = _channels(input, weight_index, wide) - mean.reshape(-1, 1).to(wide)
        normalized = centered * rstd.reshape(-1, 1).to(wide)
        sums.append((_channels(grad_output, weight_index, wide) * normalized).sum(0))
    if bias_index is not None:
        sums.append(_channels(grad_output, bias_index, wide).sum(0))
    return torch.cat(sums) if sums else grad_output.new_empty(0, dtype=wide)


def _channels(tensor: Tensor, index: Tensor, wide: torch.dtype) -> Tensor:
    """Some channels of a tensor; one that it has not is NaN."""
    n_channels = tensor.shape[1]
    is_one = (index >= 0) & (index < n_channels)
    taken = tensor.index_select(1, index.clamp(0, n_channels - 1)).to(wide)
    return torch.where(is_one, taken, float("nan"))
