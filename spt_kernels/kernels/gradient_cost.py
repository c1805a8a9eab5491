"""Which way to the entries of a weight gradient is the cheapest on a card, by estimated rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from .tile_plan import TilePlan


class Way(Enum):
    """How the entries are computed."""

    VECTORS = "vectors"  # both factors of every entry gathered
    TILES = "tiles"  # products on tensor cores, tile by tile, of which the entries are kept
    DENSE = "dense"  # torch's product, a block of rows at a time, and the entries read from it


@dataclass(frozen=True)
class Rates:
    """What a token costs, in products (one multiplication, one addition) of torch's dense product.

    Attributes:
        gathered: of an entry whose two factors are gathered.
        tiled: of an element of a tile, as far as arithmetic goes.
        staged: of a value that a program reads for a tile, from L2 mostly.
        copied: of a value that is copied beforehand: compacted or transposed.
    """

    gathered: float
    tiled: float
    staged: float
    copied: float


# By compute capability and whether values are fp32. From the figures of the cards, as
# `bench/gradient_model.py` derives them; not measured. Torch's product of fp32 values does without
# tensor cores, which is why tiles (three TF32 products each) beat it on cards strong in TF32.
RATES: Mapping[tuple[int, bool], Rates] = {
    (80, False): Rates(gathered=390, tiled=1.35, staged=55, copied=290),
    (86, False): Rates(gathered=105, tiled=1.35, staged=24, copied=150),
    (90, False): Rates(gathered=630, tiled=1.35, staged=110, copied=420),
    (80, True): Rates(gathered=40, tiled=0.53, staged=7.4, copied=38),
    (86, True): Rates(gathered=71, tiled=3.25, staged=18.5, copied=116),
    (90, True): Rates(gathered=80, tiled=0.51, staged=18, copied=70),
}


def cheapest_way(
    plan: TilePlan | None,
    nnz: int,
    shape: tuple[int, int],
    *,
    capability: int,
    is_fp32: bool,
) -> Way:
    """The way with the smallest estimate; the same for the same arguments.

    Args:
        plan: the tiles of the entries; without one they cannot be computed by tiles.
        nnz: entries wanted.
        shape: rows and columns of the weight.
        capability: the card's, one of `card.CAPABILITIES`.
        is_fp32: whether values are fp32 rather than bf16 or fp16.
    """
    rates = RATES[capability, is_fp32]
    n_rows, n_columns = shape if plan is None else compacted_shape(plan, shape)
    copied = (n_rows if n_rows != shape[0] else 0) + (n_columns if n_columns != shape[1] else 0)
    costs = {
        Way.VECTORS: rates.gathered * nnz,
        Way.DENSE: n_rows * n_columns + rates.copied * copied,
    }
    if plan is not None:
        if plan.lists is not None:
            copied += shape[0] if plan.lists_rows else shape[1]
        products = max(rates.tiled * plan.numel, rates.staged * plan.staged)
        costs[Way.TILES] = products + rates.copied * copied
    return min(costs, key=lambda way: costs[way])


def compacted_shape(plan: TilePlan, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that remain where the plan brings together those that occur."""
    n_rows, n_columns = (
        side.numel() if side.dim() == 1 and side.numel() else whole
        for side, whole in zip((plan.rows, plan.columns), shape, strict=True)
    )
    return n_rows, n_columns
