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
    DENSE = "dense"  # torch's product of the whole matrix, and the entries read from it


@dataclass(frozen=True)
class Rates:
    """What a token costs, in products (one multiplication, one addition) of torch's dense product.

    Attributes:
        gathered: of an entry whose two factors are gathered.
        tiled: of an element of a tile, as far as arithmetic goes.
        staged: of a value that a program reads for a tile, from L2 mostly.
        copied: of a value that is transposed beforehand.
        selected: of a value of a channel that `index_select` brings together with others.
        called: of a dense product besides its elements: it fills a card badly when it is small, and
            the entries are still to be read from it.
    """

    gathered: float
    tiled: float
    staged: float
    copied: float
    selected: float
    called: float


# By compute capability and whether values are fp32. Those of 90 fit what an H100 took for 12,608
# tokens (torch 2.11, Triton 3.6; `tests/kernels/test_gradient_cost.py` has the times). The others
# are not measured: what the cards' figures give, as far off as they were on the H100, but for TF32
# tiles, for which Triton does not use Hopper's fastest units (`bench/gradient_model.py`).
RATES: Mapping[tuple[int, bool], Rates] = {
    (80, False): Rates(490, tiled=1.8, staged=57, copied=348, selected=1250, called=563_000),
    (86, False): Rates(130, tiled=1.8, staged=24.6, copied=183, selected=660, called=427_000),
    (90, False): Rates(780, tiled=1.8, staged=112, copied=512, selected=1844, called=688_000),
    (80, True): Rates(37.7, tiled=0.53, staged=7.4, copied=34.7, selected=125, called=52_400),
    (86, True): Rates(66.8, tiled=3.25, staged=18.5, copied=106, selected=380, called=39_800),
    (90, True): Rates(75, tiled=1.6, staged=60, copied=64, selected=230, called=64_000),
}


# How many times as fast torch's fp32 product is where TF32 is allowed, by the cards' figures: not
# measured. Tiles, which multiply three times to be exact, are then out of the question.
TF32_GAIN: Mapping[int, float] = {80: 6.0, 86: 1.0, 90: 6.0}


def cheapest_way(
    plan: TilePlan | None,
    nnz: int,
    shape: tuple[int, int],
    *,
    capability: int,
    is_fp32: bool,
    allows_tf32: bool = False,
) -> Way:
    """The way with the smallest estimate; the same for the same arguments.

    Args:
        plan: the tiles of the entries; without one they cannot be computed by tiles.
        nnz: entries wanted.
        shape: rows and columns of the weight.
        capability: the card's, one of `card.CAPABILITIES`.
        is_fp32: whether values are fp32 rather than bf16 or fp16.
        allows_tf32: whether torch may round the factors of an fp32 product to TF32.
    """
    rates = RATES[capability, is_fp32]
    costs = {Way.VECTORS: rates.gathered * nnz, Way.DENSE: shape[0] * shape[1] + rates.called}
    if is_fp32 and allows_tf32:
        costs[Way.DENSE] /= TF32_GAIN[capability]
    elif plan is not None:
        selected = sum(side.numel() for side in (plan.rows, plan.columns) if side.dim() == 1)
        copied = 0 if plan.lists is None else shape[0] if plan.lists_rows else shape[1]
        products = max(rates.tiled * plan.numel, rates.staged * plan.staged)
        costs[Way.TILES] = products + rates.selected * selected + rates.copied * copied
    return min(costs, key=lambda way: costs[way])
