"""Tensors that exchange their values where they lie, with hardly any memory beside them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_AT_ONCE = 1 << 20  # elements, unless a row has more


class Exchange:
    """Pairs of tensors that take each other's values whenever this is called.

    All that takes memory is had when it is made, so that what was exchanged can be exchanged back
    where memory has run out.
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Make ready.

        Args:
            pairs: of the same shape, dtype and device, in whatever memory format.
        """
        self._pairs = [(_rows(one), _rows(other)) for one, other in pairs]
        most: dict[tuple[torch.dtype, torch.device], int] = {}
        for one, _ in self._pairs:
            kind = one.dtype, one.device
            most[kind] = max(most.get(kind, 0), min(len(one), _at_once(one)) * _width(one))
        self._spare = {
            (dtype, device): torch.empty(count, dtype=dtype, device=device)
            for (dtype, device), count in most.items()
        }

    @torch.no_grad()
    def __call__(self) -> None:
        """Exchange."""
        for one, other in self._pairs:
            spare, count = self._spare[one.dtype, one.device], _at_once(one)
            for start in range(0, len(one), count):
                a, b = one[start : start + count], other[start : start + count]
                kept = spare[: a.numel()].view(a.shape)
                kept.copy_(a)
                a.copy_(b)
                b.copy_(kept)


def _rows(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.ndim else tensor.unsqueeze(0)


def _width(rows: Tensor) -> int:
    """Elements of a row."""
    return rows.numel() // max(1, len(rows))


def _at_once(rows: Tensor) -> int:
    """Rows."""
    return max(1, _AT_ONCE // max(1, _width(rows)))
