"""Prints, as Markdown, what every kernel must and should take on each card, from shapes alone.

`python -m bench.roofline_gpu`: floors (bytes over the memory's rate, operations over the unit's
rate), expected times by a simple model, and what holds them off. Nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spt_kernels.costs.drawn_mask import draw_mask
from spt_kernels.gradient_ways.gradient_cost import RATES, Way, Work, cheapest_way
from spt_kernels.gradient_ways.tile_plan import TilePlan, plan_tiles
from spt_kernels.kernels import squared_products

from .cards import CARDS, Card
from .gradient_model import (
    MEMORY_SHARE,
    Gradient,
    shared_gather_us,
    staged_values,
    transposed_values,
    ways_us,
)
from .markdown import markdown

IMAGES, IMAGE, WIDTH, HIDDEN = 64, 197, 768, 3072  # ViT-B/16 at 224², batch 64, tokens of each
TOKENS = IMAGES * IMAGE
BACKBONE = 12 * (4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN)  # elements of the blocks' matrices
# of the blocks' products, attention's with itself included, in a forward of a batch
BLOCK_FLOPS = 2 * TOKENS * (BACKBONE + 12 * 2 * IMAGE * WIDTH)
TRAINED = 400_000
RANK, SPLITS = 8, 8  # of a LoRA; in how many parts its gradient sums over tokens, about
DENSITIES = (0.001, 0.005, 0.01, 0.02, 0.05)
LAUNCH_US = 3.0  # from one kernel's end to the next one's work: assumed
SECTOR = 32  # bytes that a scattered access moves at least


@dataclass(frozen=True)
class Kernel:
    """What one op must move and compute, and what its kernels do besides.

    Attributes:
        name: the op and what it is given.
        least_bytes: that must come from or go to memory.
        moved_bytes: that the kernels move.
        flops: that must be done.
        unit: `"tensor"` or `"fp32"`.
        launches: kernels, one after the other.
        held_off_by: why it takes longer than its floor.
    """

    name: str
    least_bytes: int
    moved_bytes: int
    flops: int
    unit: str
    launches: int
    held_off_by: str

    def floor_us(self, card: Card) -> float:
        """What no implementation can beat: bytes or operations at the card's peaks."""
        return max(
            self.least_bytes / card.memory_gb * 1e-3, self.flops / _tflops(card, self.unit) * 1e-6
        )

    def expected_us(self, card: Card) -> float:
        """What these kernels should take."""
        share = {"tensor": card.tensor_share / 1.35, "fp32": 0.7}[self.unit]
        memory = self.moved_bytes / (card.memory_gb * MEMORY_SHARE) * 1e-3
        arithmetic = self.flops / (_tflops(card, self.unit) * share) * 1e-6
        return max(memory, arithmetic) + self.launches * LAUNCH_US


def _tflops(card: Card, unit: str) -> float:
    rates = {"tensor": card.tensor_tflops, "fp32": card.fp32_tflops}
    return rates[unit]


def kernels(images: int = IMAGES) -> list[Kernel]:
    """Every op but the sparse weight gradient, at the sizes above."""
    found, tokens = [], images * IMAGE
    for name, itemsize, unit in (("bf16", 2, "tensor"), ("fp32", 4, "fp32")):
        factors = tokens * (WIDTH + HIDDEN) * itemsize
        score = 2 * 4 * WIDTH * HIDDEN
        products = 0 if name == "bf16" else images * score  # written and read
        groups = -(-images * 4 * WIDTH * HIDDEN // squared_products._PRODUCT_BYTES)
        found += [
            Kernel(
                f"squared_grad, fc1 {HIDDEN}×{WIDTH}, {name}",
                factors + score,
                factors + score + products,
                2 * tokens * WIDTH * HIDDEN,
                unit,
                1 if name == "bf16" else 2 * groups,
                "two fp32 accumulators a tile leave one program on a multiprocessor, so that the "
                "ends of samples are not hidden"
                if name == "bf16"
                else "torch's products, which are written and read again",
            ),
            Kernel(
                f"squared_grad, LayerNorm of {WIDTH}, {name}",
                2 * tokens * (WIDTH * itemsize + 4),
                2 * tokens * (WIDTH * itemsize + 4) + 2 * 2 * 32 * WIDTH * 4,
                6 * tokens * WIDTH,
                "fp32",
                1,
                "the launch, and what a streaming kernel gets of the memory",
            ),
            Kernel(
                f"rebuild_input, LayerNorm of {WIDTH}, {name}",
                2 * tokens * WIDTH * itemsize + 2 * tokens * 4,
                2 * tokens * WIDTH * itemsize + 2 * tokens * 4,
                4 * tokens * WIDTH,
                "fp32",
                1,
                "the launch, and what a streaming kernel gets of the memory",
            ),
            Kernel(
                f"rebuild_input, GELU of {HIDDEN}, {name}",
                2 * tokens * HIDDEN * itemsize,
                2 * tokens * HIDDEN * itemsize,
                25 * tokens * HIDDEN,
                "fp32",
                1,
                "what a streaming kernel gets of the memory; erf is about 25 operations",
            ),
            *_low_rank(tokens, name, itemsize),
        ]
    return [*found, *_ops_on_entries()]


def _low_rank(tokens: int, name: str, itemsize: int) -> Iterator[Kernel]:
    """A LoRA's products; tensor cores take a factor of 8 columns as one of 16."""
    streaming = "the launch, and what a streaming kernel gets of the memory"
    down, inner = tokens * WIDTH * itemsize, tokens * RANK * itemsize
    flops = 2 * tokens * WIDTH * 2 * RANK * (1 if name == "bf16" else 3)  # tf32x3 of fp32
    yield Kernel(
        f"low_rank_down, {WIDTH} to {RANK}, {name}",
        *(down + inner, down + inner, flops, "tensor", 1, streaming),
    )
    yield Kernel(
        f"low_rank_up, {RANK} to {WIDTH}, {name}",
        *(2 * down + inner, 2 * down + inner, flops, "tensor", 1, streaming),
    )
    read, partial = tokens * HIDDEN * itemsize + inner, 4 * RANK * HIDDEN
    yield Kernel(
        f"low_rank_grad, of a GELU of {HIDDEN}, {name}",
        read + partial,
        read + (2 * SPLITS + 1) * partial,
        25 * tokens * HIDDEN,
        "fp32",
        2,
        "the launches, and erf, which is about 25 operations",
    )


def _top_tau() -> Kernel:
    # the guess from 256 scores of each of 48 tensors lets nearly twice as many pass, most of them
    # in a four of their own: bits and place are written once, bits read seven times
    scores, fours = 4 * BACKBONE, 2 * TRAINED
    return Kernel(
        f"top_tau, {BACKBONE / 1e6:.0f}M fp32, τ = {TRAINED:,}",
        scores + 8 * TRAINED,
        scores + 20 * fours + 7 * 16 * fours + 8 * TRAINED,
        BACKBONE,
        "fp32",
        11,
        "launches: the sample, its guess, the filter, four digits, count and collect, a fill and a "
        "copy; the host waits once, before collect",
    )


def _ops_on_entries() -> Iterator[Kernel]:
    yield _top_tau()
    state = 4 * (4 + 3)  # parameter, gradient, two moments read; three of them written
    scattered = 4 + 4 + 2 * SECTOR  # index, original, and a sector of the weight read and written
    yield Kernel(
        f"sparse_adamw, {TRAINED:,} values of fp32 weights",
        TRAINED * (state + scattered),
        TRAINED * (state + scattered),
        20 * TRAINED,
        "fp32",
        2,
        "two launches; of every sector of 32 bytes one value is written",
    )
    yield Kernel(
        f"write_delta, {TRAINED:,} values of fp32 weights",
        TRAINED * (4 + scattered),
        TRAINED * (4 + scattered),
        TRAINED,
        "fp32",
        2,
        "the launch and the upload of the table",
    )


def fc1(density: float, itemsize: int) -> tuple[Gradient, TilePlan]:
    """The gradient of the largest matrix with a uniform mask, the hardest, and its real tiles."""
    index = draw_mask(HIDDEN, WIDTH, density)
    gradient = Gradient(HIDDEN, WIDTH, TOKENS, len(index), itemsize)
    return gradient, plan_tiles(index, HIDDEN, WIDTH)


def taken_way(card: Card, gradient: Gradient, plan: TilePlan) -> Way:
    """What the shipped cost model takes on this card."""
    work = Work.of(plan, gradient.nnz, (gradient.rows, gradient.columns))
    return cheapest_way(work, RATES[card.capability], is_fp32=gradient.itemsize == 4)


def rows_of_gradients(itemsize: int) -> Iterator[tuple[str, ...]]:
    """For each density and card: every way, what the cost model takes, its ratio to dense."""
    for density in DENSITIES:
        gradient, plan = fc1(density, itemsize)
        tiles = "tiles" if plan.lists is None else "strips"
        names = {Way.VECTORS: "vectors", Way.TILES: tiles, Way.DENSE: "dense, then read"}
        for card in CARDS:
            us = ways_us(card, gradient, plan)
            way = taken_way(card, gradient, plan)
            yield (
                f"{density:.1%}",
                card.name,
                f"{gradient.read_bytes / card.memory_gb * 1e-3:.0f}",
                f"{us[Way.DENSE]:.0f}",
                f"{us[Way.VECTORS]:.0f}",
                f"{us[Way.TILES]:.0f} ({tiles})",
                names[way],
                f"{us[way] / us[Way.DENSE]:.2f}",
            )


def verdict(itemsize: int, target: float = 0.6) -> str:
    """Where the target at 0.5 % should be reached, and what is in the way where not."""
    gradient, plan = fc1(0.005, itemsize)
    lines = []
    for card in CARDS:
        us = ways_us(card, gradient, plan)
        ratio = us[taken_way(card, gradient, plan)] / us[Way.DENSE]
        line = f"- {card.name}: {ratio:.2f}, {'reached' if ratio <= target else 'not reached'}"
        if ratio > target:
            staged = staged_values(plan) * gradient.tokens * itemsize
            copied = 2 * transposed_values(plan) * gradient.tokens * itemsize
            through = [shared_gather_us(card, gradient, packed=p) for p in (True, False)]
            line += (
                f": strips stage {staged / 1e6:.0f} MB through L2, "
                f"{staged / card.l2_gb * 1e-3:.0f} µs, after a transposed copy of "
                f"{copied / 1e6:.0f} MB, {copied / (card.memory_gb * MEMORY_SHARE) * 1e-3:.0f} µs. "
                "Gathering from tokens staged in shared memory (`tl.gather`) costs "
                f"{through[1]:.0f} µs of shared-memory cycles alone, {through[0]:.0f} µs with two "
                "tokens to a word, and every gather stands between two barriers, so that nothing "
                "overlaps"
            )
        lines.append(line + ".")
    return "\n".join(lines)


def report() -> str:
    """The whole report."""
    parts = ["### Cards", markdown(_CARD_TITLES, [_card_row(card) for card in CARDS]), _CARD_NOTE]
    parts += [
        "### Every kernel: floor → expected, µs",
        markdown(_kernel_titles(), [*_kernel_rows()]),
    ]
    parts += ["### Sparse weight gradient, µs", _GRADIENT_NOTE]
    for itemsize, name in ((2, "bf16 or fp16"), (4, "fp32")):
        parts += [
            f"{HIDDEN}×{WIDTH}, {TOKENS:,} tokens, uniform masks, {name}:",
            markdown(_GRADIENT_TITLES, [*rows_of_gradients(itemsize)]),
            "Target at 0.5 %: 0.6 of torch's dense product, by this model:",
            verdict(itemsize),
        ]
    return "\n\n".join(parts) + "\n"


_CARD_TITLES = ("card", "tensor", "TF32", "fp32", "memory", "L2 (assumed)", "source")
_CARD_NOTE = (
    "Peaks in TFLOP/s (dense) and GB/s. Assumed besides: torch's product gets "
    + ", ".join(f"{card.tensor_share:.0%} ({card.name})" for card in CARDS)
    + f" of the tensor cores, Triton's three quarters of that; a stream {MEMORY_SHARE:.0%} of the "
    f"memory; a launch {LAUNCH_US:.0f} µs. None of this is measured."
)
_GRADIENT_TITLES = ("entries", "card", "floor", "torch, dense", "vectors", "tensor cores", "taken")
_GRADIENT_TITLES += ("ours / dense",)
_GRADIENT_NOTE = (
    "The floor reads both factors once. *Vectors* gather both factors of every entry: a warp's "
    "load touches as many lines as lie under 32 columns, one after the other. *Strips* multiply 64 "
    "rows by the columns that occur in them, on tensor cores, from a transposed copy of the input "
    "whose tokens lie side by side, so that every load is a whole word of 128 bits. *Tiles* are "
    "squares of the whole gradient. Where neither wins, torch's product is taken and the entries "
    "are read from it: so it is never slower than dense by more than that read. The model is "
    "fitted to 30 times of an H100: it gives 0.8 to 1.8 times what that took, half of them within "
    "a quarter, and ranks the ways as they were. The other cards are as far from their figures as "
    "that one; none of them is measured."
)


def _card_row(card: Card) -> tuple[str, ...]:
    peaks = (card.tensor_tflops, card.tf32_tflops, card.fp32_tflops, card.memory_gb, card.l2_gb)
    return (card.name, *(f"{peak:,.4g}" for peak in peaks), card.source)


def _kernel_titles() -> tuple[str, ...]:
    return ("kernel", "MB", "GFLOP", *(card.name for card in CARDS), "held off by")


def _kernel_rows() -> Iterator[tuple[str, ...]]:
    for kernel in kernels():
        times = (f"{kernel.floor_us(c):.0f} → {kernel.expected_us(c):.0f}" for c in CARDS)
        sizes = (f"{kernel.least_bytes / 1e6:.0f}", f"{kernel.flops / 1e9:.2g}")
        yield (kernel.name, *sizes, *times, kernel.held_off_by)


if __name__ == "__main__":
    print(report(), end="")
