"""Which way to the entries of a weight gradient is the cheapest on a card, by the card's rates."""

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
        selected: of a value of a channel that is brought together with others.
        called: of a dense product besides its elements: it fills a card badly when it is small, and
            the entries are still to be read from it.
    """

    gathered: float
    tiled: float
    staged: float
    copied: float
    selected: float
    called: float


@dataclass(frozen=True)
class CardRates:
    """The rates of one card.

    Attributes:
        narrow: of bf16 and fp16.
        fp32: of fp32, whose tiles multiply three times to be exact.
        tf32_gain: how many times as fast torch's fp32 product is where TF32 is allowed.
    """

    narrow: Rates
    fp32: Rates
    tf32_gain: float


# By compute capability. Those of 90 fit what an H100 took for 12,608 tokens (torch 2.11, Triton
# 3.6; `bench/measured.py` has the times). The others are not measured: what the cards' figures
# give, as far off as they were on the H100, but for TF32 tiles, for which Triton does not use
# Hopper's fastest units (`bench/gradient_model.py`). TF32's gains are by the cards' figures alone.
RATES: Mapping[int, CardRates] = {
    80: CardRates(
        narrow=Rates(490, tiled=1.8, staged=57, copied=348, selected=1250, called=563_000),
        fp32=Rates(37.7, tiled=0.53, staged=7.4, copied=34.7, selected=125, called=52_400),
        tf32_gain=6.0,
    ),
    86: CardRates(
        narrow=Rates(130, tiled=1.8, staged=24.6, copied=183, selected=660, called=427_000),
        fp32=Rates(66.8, tiled=3.25, staged=18.5, copied=106, selected=380, called=39_800),
        tf32_gain=1.0,
    ),
    90: CardRates(
        narrow=Rates(780, tiled=1.8, staged=112, copied=512, selected=1844, called=688_000),
        fp32=Rates(75, tiled=1.6, staged=60, copied=64, selected=230, called=64_000),
        tf32_gain=6.0,
    ),
}

# By name, of cards that were measured as `bench tune` does (torch 2.11, Triton 3.6): an H200 reads
# what tiles wait for in half an H100's time
RATES_BY_NAME: Mapping[str, CardRates] = {
    "NVIDIA H200": CardRates(
        narrow=Rates(844, tiled=1.73, staged=55.4, copied=726, selected=2091, called=612_000),
        fp32=Rates(68.4, tiled=1.32, staged=42.2, copied=0, selected=232, called=59_700),
        tf32_gain=4.46,
    ),
}


@dataclass(frozen=True)
class Work:
    """What every way to the entries of a gradient does for one token.

    Attributes:
        entries: that are wanted.
        elements: of the whole gradient.
        tiled: elements of all tiles together; 0 where the entries have no tiles.
        staged: values that the programs of all tiles read together.
        selected: values of channels that are brought together for tiles beforehand.
        copied: values that are transposed for strips beforehand.
    """

    entries: int
    elements: int
    tiled: int = 0
    staged: int = 0
    selected: int = 0
    copied: int = 0

    @staticmethod
    def of(plan: TilePlan | None, nnz: int, shape: tuple[int, int]) -> Work:
        """For `nnz` entries of a weight of `shape`; without a plan they have no tiles."""
        elements = shape[0] * shape[1]
        if plan is None:
            return Work(nnz, elements)
        selected = sum(side.numel() for side in (plan.rows, plan.columns) if side.dim() == 1)
        copied = 0 if plan.lists is None else shape[0] if plan.lists_rows else shape[1]
        return Work(nnz, elements, plan.numel, plan.staged, selected, copied)

    def costs(self, rates: Rates) -> dict[Way, float]:
        """Of every way that there is, in products of the dense one."""
        costs = {
            Way.VECTORS: rates.gathered * self.entries,
            Way.DENSE: self.elements + rates.called,
        }
        if self.tiled:
            products = max(rates.tiled * self.tiled, rates.staged * self.staged)
            beforehand = rates.selected * self.selected + rates.copied * self.copied
            costs[Way.TILES] = products + beforehand
        return costs


def cheapest_way(work: Work, rates: CardRates, *, is_fp32: bool, allows_tf32: bool = False) -> Way:
    """The way with the smallest estimate; the same for the same arguments.

    Args:
        work: what the ways do.
        rates: what that costs.
        is_fp32: whether values are fp32 rather than bf16 or fp16.
        allows_tf32: whether torch may round the factors of an fp32 product to TF32: tiles, which
            multiply three times to be exact, are then out of the question.
    """
    costs = work.costs(rates.fp32 if is_fp32 else rates.narrow)
    if is_fp32 and allows_tf32:
        costs[Way.DENSE] /= rates.tf32_gain
        costs.pop(Way.TILES, None)
    return min(costs, key=lambda way: costs[way])
