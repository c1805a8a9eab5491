"""Triton kernel that finds the last selected score, eight bits after eight, from histograms."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .top_tau_pieces import (
    WORDS,
    Candidates,
    Pieces,
    group_of,
    read_runs,
    runs_of,
    variants_that_read,
)
from .variant import Variant

# Non-negative floats order as their bits. A histogram of 256 bins is what Triton makes at the speed
# of memory: each warp counts by votes, of which more bins need more.
BINS = tl.constexpr(256)
SHIFTS = (23, 15, 7, 0)

# What is found out about a selection lies in one buffer: these words, then of each tensor its
# scores above the threshold, then those equal to it, then the histograms of each digit
LOW, N_FOURS, REACHED, INVALID, PREFIX = (tl.constexpr(n) for n in range(5))
HEADER = tl.constexpr(8)


def state_words(n_tensors: int, n_rows: int) -> int:
    """Length of that buffer, with histograms of `n_rows` tensors or of all together."""
    return HEADER.value + 2 * n_tensors + len(SHIFTS) * n_rows * (BINS.value + 1)


@triton.jit
def level_of(state_ptr, n_tensors, n_rows, LEVEL: tl.constexpr):
    """A row of bins for each histogram of a digit, then of each what is above all of its bins."""
    return state_ptr + HEADER + 2 * n_tensors + LEVEL * n_rows * (BINS + 1)


@triton.jit
def next_prefix(table_ptr, state_ptr, n_tensors, n_rows, k, LEVEL: tl.constexpr):
    """The bits of the last selected score down to a digit, from that digit's histograms.

    Every program finds them for itself: that takes less than to launch one more. -1 if the scores
    do not reach `k`.
    """
    level_ptr = level_of(state_ptr, n_tensors, n_rows, LEVEL)
    bins = tl.arange(0, BINS)
    reached = tl.zeros([BINS], tl.int64)  # what a threshold at each bin counts for: never rises
    for start in range(0, n_rows, 2):
        row = start + tl.arange(0, 2)
        known = row < n_rows
        count_ptr = level_ptr + row[:, None] * BINS + bins[None, :]
        counts = tl.load(count_ptr, mask=known[:, None], other=0)
        above = tl.load(level_ptr + n_rows * BINS + row, mask=known, other=0)
        cap = tl.load(table_ptr + row * WORDS + 5, mask=known, other=0)
        selected = above[:, None] + tl.cumsum(counts, 1, reverse=True)
        reached += tl.sum(tl.minimum(selected, cap[:, None]), 0)
    digit = tl.sum((reached >= k).to(tl.int64), 0) - 1

    if LEVEL == 0:
        tl.store(state_ptr + REACHED, tl.sum(tl.where(bins == 0, reached, 0), 0))
        prefix = digit
    elif LEVEL == 3:
        prefix = tl.load(state_ptr + PREFIX + 2) << 7 | digit
    else:
        prefix = tl.load(state_ptr + PREFIX + LEVEL - 1) << 8 | digit
    tl.store(state_ptr + PREFIX + LEVEL, prefix)  # each program the same
    return prefix


@triton.jit(do_not_specialize=["n_tensors", "n_rows", "k", "capacity"])
def histogram_kernel(
    table_ptr,
    state_ptr,
    runs_ptr,
    scores_ptr,
    n_tensors,
    n_rows,
    k: tl.int64,
    capacity: tl.int64,
    LEVEL: tl.constexpr,
    SHIFT: tl.constexpr,
    ABOVE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Counts the scores with the prefix that is known, by the digit after it.

    A row for each tensor, or one row: caps make the difference.
    """
    tensor, row_ptr, origin = group_of(table_ptr, n_tensors, TILE, TILES)
    at, length = runs_of(row_ptr, origin, runs_ptr, capacity, TILE, TILES)
    low = tl.load(state_ptr + LOW).to(tl.uint32)
    level_ptr = level_of(state_ptr, n_tensors, n_rows, LEVEL)
    row = tl.minimum(tensor, n_rows - 1).to(tl.int64)
    bins = tl.arange(0, BINS)

    if LEVEL > 0:
        prefix = next_prefix(table_ptr, state_ptr, n_tensors, n_rows, k, LEVEL - 1)
        last_ptr = level_of(state_ptr, n_tensors, n_rows, LEVEL - 1)
        higher = bins > (prefix & (BINS - 1))
        above = tl.sum(tl.load(last_ptr + row * BINS + bins, mask=higher, other=0), 0)
        above += tl.load(last_ptr + n_rows * BINS + row)
        tl.store(level_ptr + n_rows * BINS + row, above)  # each program of a row the same

    counts = tl.zeros([BINS], tl.int32)
    for slot in range(0, tl.max(length, 0), SLOTS):
        slots = slot + tl.arange(0, SLOTS)[None, :]
        bits = read_runs(row_ptr, origin, scores_ptr, at, length, slots, low)
        if LEVEL == 0:
            counted = bits != 0
            digits = tl.minimum(bits >> SHIFT, BINS - 1)  # negative numbers with NaN
        else:
            counted = (bits != 0) & ((bits >> ABOVE).to(tl.int32) == prefix)
            digits = (bits >> SHIFT) & ((1 << (ABOVE - SHIFT)) - 1)
        flat = tl.reshape(digits.to(tl.int32), (TILES * SLOTS,))
        counts += tl.histogram(flat, BINS, mask=tl.reshape(counted, (TILES * SLOTS,)))

    # integers: the sum is the same in whatever order the programs come
    count_ptr = level_ptr + row * BINS + bins
    tl.atomic_add(count_ptr, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    if LEVEL == 0:  # finite floats have no exponent of 255
        invalid = tl.sum(tl.where(bins == BINS - 1, counts, 0), 0)
        tl.atomic_add(state_ptr + INVALID, invalid.to(tl.int64), sem="relaxed")


def rank(pieces: Pieces, state: Tensor, n_rows: int, k: int, kept: Candidates | None) -> None:
    """Fill the histograms of all digits, with `n_rows` rows: one for each tensor, or one."""
    for level in range(len(SHIFTS)):
        pieces.launch_on_groups(histogram_kernel, state, kept, (), (n_rows, k), _digit(level))


def _digit(level: int) -> tuple[int, int, int]:
    """`LEVEL`, `SHIFT` and `ABOVE` of its histogram."""
    return level, SHIFTS[level], 31 if level == 0 else SHIFTS[level - 1]


def shipped_variants() -> list[Variant]:
    """A histogram for each digit, of candidates or of all scores."""
    types = {"table_ptr": "*i64", "state_ptr": "*i64"}
    return [
        variant
        for level in range(len(SHIFTS))
        for variant in variants_that_read(
            f"histogram-{level}",
            histogram_kernel,
            types,
            dict(zip(("LEVEL", "SHIFT", "ABOVE"), _digit(level), strict=True)),
        )
    ]
