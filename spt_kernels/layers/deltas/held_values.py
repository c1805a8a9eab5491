"""What a target holds at the positions of its delta, and whether that is base + delta."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def gather(target: Tensor, index: Tensor) -> Tensor:
    """The values of a tensor at flat positions: `[nnz]`."""
    return target.detach().reshape(-1).index_select(0, index)


def can_be_looked_at(delta: Any) -> bool:
    """Whether the target of a `SparseDelta` is here, whole, with values that may be read now."""
    target = delta.target
    if delta.beside or delta.is_away or delta.written.is_sharded or isinstance(target, FakeTensor):
        return False
    return not (target.is_cuda and torch.cuda.is_current_stream_capturing())


@torch.no_grad()
def holds(delta: Any) -> bool:
    """Whether the target of a `SparseDelta` holds it already, up to one rounding, of any kind.

    It looks at the values, which waits for a card; a tensor on meta has none that could differ.
    """
    if delta.target.device.type == "meta" or delta.index.numel() == 0:
        return True
    truth = delta.original.double() + delta.delta.double().view(-1)
    held = gather(delta.target, delta.index).double()
    numbers = torch.finfo(delta.target.dtype)
    is_near = (held - truth).abs() <= numbers.eps * truth.abs() + numbers.tiny
    # what is not a number, or too large for the dtype, is there as it is rounded to
    nearest = truth.to(delta.target.dtype).double()
    return bool((is_near | (held == nearest) | (held.isnan() & truth.isnan())).all())
