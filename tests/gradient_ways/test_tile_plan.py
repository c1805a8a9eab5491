"""A tile plan lists every entry once, in the tile and at the place where the entry lies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spt_kernels.gradient_ways import tile_plan
from spt_kernels.gradient_ways.tile_plan import TilePlan, plan_tiles


def some(n_rows: int, n_columns: int, share: float, shape: tuple[int, int]) -> Tensor:
    """Positions in a block of rows and columns spread evenly over a weight of `shape`."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.linspace(0, shape[0] - 1, n_rows).long()
    columns = torch.linspace(0, shape[1] - 1, n_columns).long()
    kept = torch.rand(n_rows, n_columns, generator=generator) < share
    return (rows[:, None] * shape[1] + columns)[kept].int()


def positions_of(plan: TilePlan, shape: tuple[int, int]) -> Tensor:
    """The flat position that each entry of the index has according to the plan."""
    found = torch.full((len(plan.order),), -1)
    end = 0
    for vertical, horizontal, first, last in plan.tiles.tolist():
        assert first == end < last, "tiles are not empty, and follow one another"
        end = last
        places = plan.places[first:last].long()
        along, within = vertical * plan.block + places // plan.width, places % plan.width
        if plan.lists is None:
            within += horizontal * plan.block
            listed = plan.columns if len(plan.columns) else torch.arange(shape[1])
        else:
            listed = plan.lists[horizontal]
        kept, extent = (plan.columns, shape[1]) if plan.lists_rows else (plan.rows, shape[0])
        kept = kept if len(kept) else torch.arange(extent)
        row, column = kept[along].long(), listed[within].long()
        if plan.lists_rows:
            row, column = column, row
        found[plan.order[first:last].long()] = row * shape[1] + column
    assert end == len(found)
    return found.int()


CASES = [
    (some(1, 1, 1.1, (1, 1)), (1, 1)),
    (some(64, 64, 0.1, (64, 64)), (64, 64)),
    (some(65, 129, 0.02, (65, 129)), (65, 129)),
    (some(300, 300, 0.01, (900, 1200)), (900, 1200)),
    (some(600, 30, 0.1, (600, 300)), (600, 300)),
    (some(520, 600, 0.5, (520, 600)), (520, 600)),
    (torch.tensor([0, 200 * 300 - 1], dtype=torch.int32), (200, 300)),
]
NAMES = ["1x1", "one-tile", "block-plus-one", "clustered", "few-columns", "dense", "corners"]


@pytest.mark.parametrize("transposed", [False, True], ids=["as-is", "transposed"])
@pytest.mark.parametrize("kind", ["squares", "strips"])
@pytest.mark.parametrize(("index", "shape"), CASES, ids=NAMES)
def test_every_entry_once_and_where_it_lies(
    index: Tensor,
    shape: tuple[int, int],
    kind: str,
    transposed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if transposed:
        index = (index % shape[1] * shape[0] + index // shape[1]).sort().values
        shape = shape[::-1]
    price = 10**6 if kind == "squares" else -(10**6)
    monkeypatch.setattr(tile_plan, "_STAGED_VALUES_PER_COPIED", price)

    plan = plan_tiles(index, *shape)

    assert (plan.lists is None) == (kind == "squares")
    assert torch.equal(positions_of(plan, shape), index)
    assert torch.equal(torch.unique(plan.tiles[:, :2], dim=0), plan.tiles[:, :2])


def test_clusters_are_brought_together_and_padded_to_whole_words() -> None:
    plan = plan_tiles(some(37, 500, 1.1, (600, 520)), 600, 520)
    assert plan.lists is None
    assert len(plan.rows) == 48
    assert torch.equal(plan.rows[37:], plan.rows[36].expand(11))
    assert len(plan.columns) == 0, "500 of 520 columns: not worth a copy"


@pytest.mark.parametrize(
    ("density", "width"), [(0.001, 128), (0.005, 256), (0.01, 128), (0.02, None), (0.3, None)]
)
def test_strips_where_they_read_less_than_squares(density: float, width: int | None) -> None:
    numel = 3072 * 768
    index = torch.randperm(numel, generator=torch.Generator().manual_seed(0))
    index = index[: int(density * numel)].sort().values.int()
    plan = plan_tiles(index, 3072, 768)
    assert (None if plan.lists is None else plan.width) == width
    assert plan.staged <= 24 * 6 * 256, "never more than squares of 128 of the whole weight"


def test_empty_index() -> None:
    plan = plan_tiles(torch.zeros(0, dtype=torch.int32), 4, 5)
    assert plan.numel == 0
    assert plan.tiles.shape == (0, 4)
