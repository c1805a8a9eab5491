"""Top-τ by sorting everything: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def top_tau(tensors: Sequence[Tensor], k: int, caps: Sequence[int]) -> list[Tensor]:
    """See `spt_kernels.ops.top_tau.top_tau`; `tensors` is not empty and has been checked."""
    values = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    if not (values.isfinite() & (values >= 0)).all():
        raise ValueError("scores must be finite and not negative")
    sizes = torch.tensor([tensor.numel() for tensor in tensors], device=values.device)
    owner = torch.repeat_interleave(sizes)
    position = torch.cat([torch.arange(int(n), device=values.device) for n in sizes])

    # a stable sort leaves ties in the order (tensor, position)
    values, order = values.sort(descending=True, stable=True)
    owner, position = owner[order], position[order]

    counted = torch.zeros_like(values, dtype=torch.bool)
    for m, cap in enumerate(caps):
        own = (owner == m) & (values > 0)
        rank = own.cumsum(0) - 1
        counted |= own & (rank < cap)
    total = counted.cumsum(0)  # [elements] what each prefix of the ranking counts for
    if k > int(counted.sum()):
        raise ValueError(f"k is {k}, but only {int(counted.sum())} positive scores can be counted")
    length = int((total < k).sum()) + 1 if k else 0
    owner, position = owner[:length], position[:length]
    return [position[owner == m].sort().values for m in range(len(tensors))]
