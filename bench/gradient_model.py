"""What each way to a sparse weight gradient should take on a card, from the card's figures."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from spt_kernels.gradient_ways.gradient_cost import RATES, Rates, Way
from spt_kernels.gradient_ways.tile_plan import TilePlan

from .cards import CARDS, Card

H100 = next(card for card in CARDS if card.capability == 90)  # which rates were measured on

# The entries that one program of the vector kernel takes, and the lanes of a warp
_ENTRIES, _LANES = 256, 32
_LINE_BYTES, _SECTOR_BYTES = 128, 32

# Common experience, not measured: what a streaming copy gets of a card's memory, what Triton's
# products get of torch's, and how far from perfectly a kernel overlaps its waiting.
MEMORY_SHARE = 0.85
_TORCH_OVER_TRITON = 1.35
_OVERLAP = 0.8
_FILLING = 4096
_TF32_SHARE = 0.6  # of the peak, when every operand is split into three TF32 products' worth


@dataclass(frozen=True)
class Gradient:
    """A weight gradient of which some entries are wanted."""

    rows: int
    columns: int
    tokens: int
    nnz: int
    itemsize: int

    @property
    def dense_flops(self) -> int:
        """Of the whole gradient."""
        return 2 * self.rows * self.columns * self.tokens

    @property
    def read_bytes(self) -> int:
        """Of both factors, once."""
        return (self.rows + self.columns) * self.tokens * self.itemsize


def rates_of(card: Card, *, is_fp32: bool) -> Rates:
    """The rates that `spt_kernels.gradient_ways.gradient_cost` has of a card that was not measured.

    What the card's figures give, each in the proportion in which an H100's measured rate departs
    from what its own figures give.
    """
    shipped = RATES[H100.capability]
    measured = asdict(shipped.fp32 if is_fp32 else shipped.narrow)
    modelled = asdict(_modelled(H100, is_fp32))
    own = asdict(_modelled(card, is_fp32))
    # Triton does not use Hopper's fastest units for TF32 tiles, which tells of no other card
    told = own.keys() - ({"tiled", "staged"} if is_fp32 and card.capability != 90 else set())
    return Rates(**{n: v * (measured[n] / modelled[n] if n in told else 1) for n, v in own.items()})


def _modelled(card: Card, is_fp32: bool, density: float = 0.005) -> Rates:
    """At fc1 of ViT-B/16, by the figures of a card alone."""
    itemsize = 4 if is_fp32 else 2
    product_ps = dense_product_ps(card, is_fp32)
    tiled_ps = product_ps * _TORCH_OVER_TRITON
    if is_fp32:
        tiled_ps = 2 / (card.tf32_tflops / 3 * _TF32_SHARE)
    fc1 = Gradient(3072, 768, 64 * 197, int(density * 3072 * 768), itemsize)
    copied = 2 * itemsize / (card.memory_gb * MEMORY_SHARE) * 1e3 / product_ps
    return Rates(
        gathered=gather_ps(card, fc1) / product_ps,
        tiled=tiled_ps / product_ps,
        staged=itemsize / card.l2_gb * 1e3 / product_ps,
        copied=copied,
        selected=copied,
        # a product fills a card from some thousands of elements on each of its multiprocessors on
        called=_FILLING * card.multiprocessors,
    )


def dense_product_ps(card: Card, is_fp32: bool) -> float:
    """One multiplication and addition of torch's dense product, in picoseconds."""
    if is_fp32:
        return 2 / (card.fp32_tflops * card.fp32_share)
    return 2 / (card.tensor_tflops * card.tensor_share)


def gather_ps(card: Card, gradient: Gradient) -> float:
    """One gathered product, in picoseconds: lines that a warp's load touches, or bytes from L2."""
    line_values = _LINE_BYTES // gradient.itemsize
    per_row = gradient.nnz / gradient.rows
    lines = gradient.columns / line_values
    touched = lines * (1 - math.exp(-_LANES / lines))
    # 32 entries lie in a few neighbouring rows, whose gradients share one or two lines
    cycles = touched + 1 + _LANES / per_row / line_values
    l1_ps = cycles / _LANES / (card.multiprocessors * card.clock_ghz * 1e-3)

    sectors = gradient.columns * gradient.itemsize / _SECTOR_BYTES
    read = sectors * (1 - math.exp(-_ENTRIES / sectors)) * _SECTOR_BYTES
    read += _ENTRIES / per_row * gradient.itemsize + _SECTOR_BYTES
    l2_ps = read / _ENTRIES / card.l2_gb * 1e3
    return max(l1_ps, l2_ps) / _OVERLAP


def ways_us(card: Card, gradient: Gradient, plan: TilePlan) -> dict[Way, float]:
    """Microseconds of every way, copies beforehand included."""
    is_fp32 = gradient.itemsize == 4
    rates = rates_of(card, is_fp32=is_fp32)
    product_us = dense_product_ps(card, is_fp32) * gradient.tokens * 1e-6
    products = max(rates.tiled * plan.numel, rates.staged * staged_values(plan))
    beforehand = rates.selected * selected_values(plan) + rates.copied * transposed_values(plan)
    return {
        Way.VECTORS: rates.gathered * gradient.nnz * product_us,
        Way.TILES: (products + beforehand) * product_us,
        Way.DENSE: (gradient.rows * gradient.columns + rates.called) * product_us,
    }


def staged_values(plan: TilePlan) -> int:
    """Values per token that programs read; places of a list that name no channel are not read."""
    if plan.lists is None:
        return plan.staged
    return len(plan.tiles) * plan.block + int((plan.lists >= 0).sum())


def selected_values(plan: TilePlan) -> int:
    """Values per token of channels that are brought together before the product."""
    return sum(side.numel() for side in (plan.rows, plan.columns) if side.dim() == 1)


def transposed_values(plan: TilePlan) -> int:
    """Values per token that are transposed for strips."""
    return 0 if plan.lists is None else int(plan.lists.max()) + 1


def shared_gather_us(card: Card, gradient: Gradient, *, packed: bool) -> float:
    """Shared-memory cycles alone of a design that stages tokens there and gathers (`tl.gather`).

    A program takes 256 rows and all columns. Of every token it stores both factors' values into
    shared memory and reads two per entry; 32 random columns meet in the same bank 3.4 at a time.

    Args:
        card: the card.
        gradient: what is wanted.
        packed: whether two tokens share a 32-bit word, which takes a shuffle of registers before.
    """
    ranges = gradient.rows / 256
    entries = gradient.nnz / ranges
    padded = 1 << (gradient.columns - 1).bit_length()  # Triton's shapes are powers of two
    stores, reads = (256 + padded) / _LANES, entries / _LANES * (3.4 + 1.2)
    cycles = (stores + reads) * ranges * gradient.tokens / (2 if packed else 1)
    return cycles / (card.multiprocessors * card.clock_ghz * 1e3)
