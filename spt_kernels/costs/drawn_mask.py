"""Masks of entries that are drawn, as sparse and as clustered as one asks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw_mask(rows: int, columns: int, density: float, share: float = 1.0) -> Tensor:
    """Sorted positions, int32, drawn uniformly from a share of the rows and of the columns."""
    generator = torch.Generator().manual_seed(0)
    some_rows, some_columns = (
        torch.randperm(size, generator=generator)[: math.ceil(share * size)]
        for size in (rows, columns)
    )
    cells = (some_rows[:, None] * columns + some_columns).flatten()
    chosen = torch.randperm(len(cells), generator=generator)[: int(density * rows * columns)]
    return cells[chosen].sort().values.int()
