"""Which tiles of a weight gradient hold selected entries, and where in its tile each entry lies."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# Rows or columns are brought together first when at most this share of them occurs: the copy reads
# and writes each value once, the product reads it once per tile.
_COMPACT_BELOW = 0.75
# A compacted width is a multiple of this many values, so that tokens stay aligned to 128 bits.
_WIDTH_MULTIPLE = 16
# From this many rows and columns on, tiles of 128 are full enough to earn their better reuse.
_LARGE_FROM = 256

# A strip: so many rows, and the columns that occur in them, in lists of one of these widths.
STRIP_HEIGHT = 64
STRIP_WIDTHS = (64, 128, 256)
# A strip needs a transposed copy of the side that it lists. Per value and token the copy moves what
# about this many values of a tile cost on their way from L2, where both kinds of tile are held.
_STAGED_VALUES_PER_COPIED = 4


@dataclass(frozen=True, eq=False)
class TilePlan:
    """The non-empty tiles of a weight's gradient, built once per index.

    Tiles are squares of `block` rows and columns, or strips: `block` channels of one side as they
    lie, and of the other side the channels that a list names.

    Attributes:
        block: rows and columns of a square, channels of a strip that are not listed.
        tiles: `[n_tiles, 4]` int32: row tile, column tile, first and end position in `order`. For
            strips the tile of the side that is not listed, the list, first and end.
        order: `[nnz]` int32: entries of the index, tile by tile.
        places: `[nnz]` int16: where in its tile each lies, in the order of `order`: row · block +
            column, for strips channel · width + place in the list.
        rows: int32 rows that tiles are made of, padded by repetition; empty: all, as they lie. In
            strips that list rows `[n_lists, width]`, padded with -1.
        columns: likewise columns.
    """

    block: int
    tiles: Tensor
    order: Tensor
    places: Tensor
    rows: Tensor
    columns: Tensor

    @functools.cached_property
    def ways(self) -> dict[Any, Any]:
        """What was chosen for these tiles, by all else that the choice hangs on."""
        return {}

    @property
    def lists(self) -> Tensor | None:
        """The lists of strips, `[n_lists, width]` rows or columns; None for square tiles."""
        for side in (self.rows, self.columns):
            if side.dim() == 2:
                return side
        return None

    @property
    def lists_rows(self) -> bool:
        """Whether strips list rows of the weight, which are channels of the output's gradient."""
        return self.rows.dim() == 2

    @property
    def width(self) -> int:
        """Columns of a square, listed channels of a strip."""
        return self.block if self.lists is None else self.lists.shape[1]

    @property
    def numel(self) -> int:
        """Elements of all tiles together: what the product costs, per token."""
        return len(self.tiles) * self.block * self.width

    @property
    def staged(self) -> int:
        """Values that programs of all tiles read together, per token."""
        return len(self.tiles) * (self.block + self.width)


def plan_tiles(index: Tensor, out_features: int, in_features: int) -> TilePlan:
    """Plan the tiles for `index`, `[nnz]` int32 positions in `[out_features, in_features]`."""
    rows, columns = index // in_features, index % in_features
    squares = _plan_squares(rows, columns, out_features, in_features)
    if len(index) == 0:
        return squares
    # the transposed copy is of the narrower side
    if out_features >= in_features:
        strips = _plan_strips(rows, columns, out_features, in_features)
    else:
        swapped = _plan_strips(columns, rows, in_features, out_features)
        strips = replace(swapped, rows=swapped.columns, columns=swapped.rows)
    copied = _STAGED_VALUES_PER_COPIED * min(out_features, in_features)
    return strips if strips.staged + copied < squares.staged else squares


def _plan_squares(rows: Tensor, columns: Tensor, height: int, width: int) -> TilePlan:
    kept_rows, row_places = _compact(rows, height)
    kept_columns, column_places = _compact(columns, width)
    height = len(kept_rows) or height
    width = len(kept_columns) or width
    block = 128 if min(height, width) >= _LARGE_FROM else 64

    column_tiles = -(-width // block)
    tile_of_entry = (row_places // block).long() * column_tiles + column_places // block
    order, occupied, *bounds = _sort_into_tiles(tile_of_entry)
    tiles = [occupied // column_tiles, occupied % column_tiles, *bounds]
    places = (row_places % block) * block + column_places % block
    return TilePlan(
        block=block,
        tiles=torch.stack(tiles, dim=1).int(),
        order=order.int(),
        places=places[order].short(),
        rows=kept_rows,
        columns=kept_columns,
    )


def _plan_strips(rows: Tensor, columns: Tensor, height: int, width: int) -> TilePlan:
    """Strips that list columns; at least one entry."""
    kept_rows, row_places = _compact(rows, height)
    group = (row_places // STRIP_HEIGHT).long()
    # every column of every group once, in order, and its place among those of its group
    occurring, entry_channel = torch.unique(group * width + columns, return_inverse=True)
    channel_group = occurring // width
    groups, channels_of_group = torch.unique_consecutive(channel_group, return_counts=True)
    firsts = channels_of_group.cumsum(0) - channels_of_group
    n_groups = -(-(len(kept_rows) or height) // STRIP_HEIGHT)
    first_of_group = firsts.new_zeros(n_groups).scatter_(0, groups, firsts)
    rank = torch.arange(len(occurring), device=rows.device) - first_of_group[channel_group]

    list_width = _best_width(channels_of_group)
    lists_of_group = (channels_of_group + list_width - 1) // list_width
    first_lists = lists_of_group.cumsum(0) - lists_of_group
    first_list = first_lists.new_zeros(n_groups).scatter_(0, groups, first_lists)
    list_of_channel = first_list[channel_group] + rank // list_width
    slot = rank % list_width
    lists = rows.new_full((int(lists_of_group.sum()), list_width), -1)
    lists[list_of_channel, slot] = (occurring % width).to(lists.dtype)

    order, occupied, *bounds = _sort_into_tiles(list_of_channel[entry_channel])
    tiles = [groups.repeat_interleave(lists_of_group), occupied, *bounds]
    places = (row_places % STRIP_HEIGHT) * list_width + slot[entry_channel]
    return TilePlan(
        block=STRIP_HEIGHT,
        tiles=torch.stack(tiles, dim=1).int(),
        order=order.int(),
        places=places[order].short(),
        rows=kept_rows,
        columns=lists,
    )


def _best_width(channels_of_group: Tensor) -> int:
    """The width of lists with which the programs read least."""

    def staged(width: int) -> int:
        n_lists = int(((channels_of_group + width - 1) // width).sum())
        return n_lists * (STRIP_HEIGHT + width)

    return min(STRIP_WIDTHS, key=staged)


def _sort_into_tiles(tile_of_entry: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entries in the order of their tiles, the tiles that have any, where each begins and ends."""
    order = torch.argsort(tile_of_entry, stable=True)
    occupied, counts = torch.unique_consecutive(tile_of_entry[order], return_counts=True)
    ends = counts.cumsum(0)
    return order, occupied, ends - counts, ends


def _compact(coordinates: Tensor, extent: int) -> tuple[Tensor, Tensor]:
    """The coordinates worth bringing together (none: stay), and each entry's place among them."""
    occurring, ranks = torch.unique(coordinates, return_inverse=True)
    if len(occurring) > _COMPACT_BELOW * extent or len(occurring) == 0:
        return coordinates.new_empty(0), coordinates
    padding = occurring[-1:].expand(-len(occurring) % _WIDTH_MULTIPLE)
    return torch.cat([occurring, padding]), ranks.int()
