"""Which tiles of a weight gradient hold selected entries, and where in its tile each entry lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows or columns are brought together first when at most this share of them occurs: the copy reads
# and writes each value once, the product reads it once per tile.
_COMPACT_BELOW = 0.75
# A compacted width is a multiple of this many values, so that tokens stay aligned to 128 bits.
_WIDTH_MULTIPLE = 16
# From this many rows and columns on, tiles of 128 are full enough to earn their better reuse.
_LARGE_FROM = 256


@dataclass(frozen=True, eq=False)
class TilePlan:
    """The non-empty tiles of a weight's gradient, built once per index.

    Attributes:
        block: rows and columns of a tile.
        tiles: `[n_tiles, 4]` int32: row tile, column tile, first and end position in `order`.
        order: `[nnz]` int32: entries of the index, tile by tile.
        places: `[nnz]` int16: row · block + column within the tile, in the order of `order`.
        rows: int32 rows that tiles are made of, padded by repetition; empty: all, as they lie.
        columns: likewise columns.
    """

    block: int
    tiles: Tensor
    order: Tensor
    places: Tensor
    rows: Tensor
    columns: Tensor

    @property
    def numel(self) -> int:
        """Elements of all tiles together: what the product costs, per token."""
        return self.tiles.shape[0] * self.block**2


def plan_tiles(index: Tensor, out_features: int, in_features: int) -> TilePlan:
    """Plan the tiles for `index`, `[nnz]` int32 positions in `[out_features, in_features]`."""
    rows, row_places = _compact(index // in_features, out_features)
    columns, column_places = _compact(index % in_features, in_features)
    height = len(rows) or out_features
    width = len(columns) or in_features
    block = 128 if min(height, width) >= _LARGE_FROM else 64

    column_tiles = -(-width // block)
    tile_of_entry = (row_places // block).long() * column_tiles + column_places // block
    order = torch.argsort(tile_of_entry, stable=True)
    occupied, counts = torch.unique_consecutive(tile_of_entry[order], return_counts=True)
    ends = counts.cumsum(0)
    tiles = torch.stack([occupied // column_tiles, occupied % column_tiles, ends - counts, ends], 1)
    places = (row_places % block) * block + column_places % block
    return TilePlan(
        block=block,
        tiles=tiles.int(),
        order=order.int(),
        places=places[order].short(),
        rows=rows,
        columns=columns,
    )


def _compact(coordinates: Tensor, extent: int) -> tuple[Tensor, Tensor]:
    """The coordinates worth bringing together (none: stay), and each entry's place among them."""
    occurring, ranks = torch.unique(coordinates, return_inverse=True)
    if len(occurring) > _COMPACT_BELOW * extent or len(occurring) == 0:
        return coordinates.new_empty(0), coordinates
    padding = occurring[-1:].expand(-len(occurring) % _WIDTH_MULTIPLE)
    return torch.cat([occurring, padding]), ranks.int()
