"""A tile plan lists every entry once, in the tile and at the place where the entry lies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spt_kernels.kernels.tile_plan import plan_tiles


def some(n_rows: int, n_columns: int, share: float, shape: tuple[int, int]) -> Tensor:
    """Positions in a block of rows and columns spread evenly over a weight of `shape`."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.linspace(0, shape[0] - 1, n_rows).long()
    columns = torch.linspace(0, shape[1] - 1, n_columns).long()
    kept = torch.rand(n_rows, n_columns, generator=generator) < share
    return (rows[:, None] * shape[1] + columns)[kept].int()


@pytest.mark.parametrize(
    ("index", "shape"),
    [
        (some(1, 1, 1.1, (1, 1)), (1, 1)),
        (some(64, 64, 0.1, (64, 64)), (64, 64)),
        (some(65, 129, 0.02, (65, 129)), (65, 129)),
        (some(300, 300, 0.01, (900, 1200)), (900, 1200)),
        (some(600, 30, 0.1, (600, 300)), (600, 300)),
        (torch.tensor([0, 200 * 300 - 1], dtype=torch.int32), (200, 300)),
    ],
    ids=["1x1", "one-tile", "block-plus-one", "clustered", "few-columns", "corners"],
)
def test_every_entry_once_and_where_it_lies(index: Tensor, shape: tuple[int, int]) -> None:
    plan = plan_tiles(index, *shape)

    rows = plan.rows if len(plan.rows) else torch.arange(shape[0])
    columns = plan.columns if len(plan.columns) else torch.arange(shape[1])
    found = torch.full_like(index, -1)
    end = 0
    for row_tile, column_tile, first, last in plan.tiles.tolist():
        assert first == end < last, "tiles are not empty, and follow one another"
        end = last
        places = plan.places[first:last].long()
        row = rows[row_tile * plan.block + places // plan.block]
        column = columns[column_tile * plan.block + places % plan.block]
        found[plan.order[first:last].long()] = (row * shape[1] + column).int()
    assert end == len(index)
    assert torch.equal(found, index)
    assert torch.equal(torch.unique(plan.tiles[:, :2], dim=0), plan.tiles[:, :2])


def test_clusters_are_brought_together_and_padded_to_whole_words() -> None:
    plan = plan_tiles(some(37, 500, 1.1, (600, 520)), 600, 520)
    assert len(plan.rows) == 48
    assert torch.equal(plan.rows[37:], plan.rows[36].expand(11))
    assert len(plan.columns) == 0, "500 of 520 columns: not worth a copy"


def test_empty_index() -> None:
    plan = plan_tiles(torch.zeros(0, dtype=torch.int32), 4, 5)
    assert plan.numel == 0
    assert plan.tiles.shape == (0, 4)
