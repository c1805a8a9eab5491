"""Triton kernels that count what is selected, then write its positions in order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .top_tau_pieces import (
    Candidates,
    Pieces,
    group_of,
    read_runs,
    runs_of,
    variants_that_read,
)
from .top_tau_rank import HEADER, LOW, next_prefix
from .variant import Variant


@triton.jit
def count_runs(
    row_ptr,
    origin,
    scores_ptr,
    at,
    length,
    low,
    threshold,
    TILES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Of each tile its scores above the threshold, and times 2¹⁶ those equal: at most a tile's."""
    found = tl.zeros([TILES, SLOTS], tl.int32)
    for slot in range(0, tl.max(length, 0), SLOTS):
        slots = slot + tl.arange(0, SLOTS)[None, :]
        bits = read_runs(row_ptr, origin, scores_ptr, at, length, slots, low)
        found += (bits > threshold).to(tl.int32) + ((bits == threshold).to(tl.int32) << 16)
    return tl.sum(found, 1)


@triton.jit(do_not_specialize=["n_tensors", "n_rows", "k", "capacity"])
def count_kernel(
    table_ptr,
    state_ptr,
    runs_ptr,
    scores_ptr,
    totals_ptr,
    n_tensors,
    n_rows,
    k: tl.int64,
    capacity: tl.int64,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """How many scores of each group, and of each tensor, are above the last selected one and equal.

    The last digit of it comes from the last histograms.
    """
    tensor, row_ptr, origin = group_of(table_ptr, n_tensors, TILE, TILES)
    at, length = runs_of(row_ptr, origin, runs_ptr, capacity, TILE, TILES)
    low = tl.load(state_ptr + LOW).to(tl.uint32)
    threshold = next_prefix(table_ptr, state_ptr, n_tensors, n_rows, k, 3)

    found = count_runs(row_ptr, origin, scores_ptr, at, length, low, threshold, TILES, SLOTS)
    n_above = tl.sum(found & 0xFFFF, 0).to(tl.int64)
    n_tied = tl.sum(found >> 16, 0).to(tl.int64)
    total_ptr = totals_ptr + tl.program_id(0).to(tl.int64) * 2
    tl.store(total_ptr, n_above)
    tl.store(total_ptr + 1, n_tied)
    of_tensor_ptr = state_ptr + HEADER + tensor
    tl.atomic_add(of_tensor_ptr, n_above, sem="relaxed")
    tl.atomic_add(of_tensor_ptr + n_tensors, n_tied, sem="relaxed")


@triton.jit
def before(totals_ptr):
    """Scores above the last selected one, and equal to it, in all groups before this program's."""
    group = tl.program_id(0)
    above = tl.zeros([1024], tl.int64)
    tied = tl.zeros([1024], tl.int64)
    for start in range(0, group, 1024):
        earlier = start + tl.arange(0, 1024)
        total_ptr = totals_ptr + earlier * 2
        above += tl.load(total_ptr, mask=earlier < group, other=0)
        tied += tl.load(total_ptr + 1, mask=earlier < group, other=0)
    return tl.sum(above, 0), tl.sum(tied, 0)


@triton.jit(do_not_specialize=["n_tensors", "threshold", "ties", "capacity"])
def collect_kernel(
    table_ptr,
    state_ptr,
    runs_ptr,
    scores_ptr,
    places_ptr,
    totals_ptr,
    output_ptr,
    n_tensors,
    threshold,
    ties: tl.int64,
    capacity: tl.int64,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Positions of the scores above the threshold and of the first `ties` equal to it, in order."""
    _, row_ptr, origin = group_of(table_ptr, n_tensors, TILE, TILES)
    at, length = runs_of(row_ptr, origin, runs_ptr, capacity, TILE, TILES)
    low = tl.load(state_ptr + LOW).to(tl.uint32)

    begin = origin + tl.arange(0, TILES) * TILE
    found = count_runs(row_ptr, origin, scores_ptr, at, length, low, threshold, TILES, SLOTS)
    n_above, n_tied = found & 0xFFFF, found >> 16
    above_before, tied_before = before(totals_ptr)
    above_before += tl.cumsum(n_above, 0) - n_above  # [tiles]
    tied_before += tl.cumsum(n_tied, 0) - n_tied

    for slot in range(0, tl.max(length, 0), SLOTS):
        slots = slot + tl.arange(0, SLOTS)[None, :]
        bits = read_runs(row_ptr, origin, scores_ptr, at, length, slots, low)
        is_above = bits > threshold
        is_tied = bits == threshold
        found = is_above.to(tl.int32) + (is_tied.to(tl.int32) << 16)
        earlier = tl.cumsum(found, 1) - found
        tied_rank = tied_before[:, None] + (earlier >> 16)
        rank = above_before[:, None] + (earlier & 0xFFFF) + tl.minimum(tied_rank, ties)
        chosen = is_above | (is_tied & (tied_rank < ties))
        place = slots
        if places_ptr is not None:
            four_ptr = places_ptr + (at[:, None] + slots) // 4
            four = tl.load(four_ptr, mask=chosen, other=0)
            place = four * 4 + slots % 4
        tl.store(output_ptr + rank, begin[:, None] + place, mask=chosen)
        found = tl.sum(found, 1)
        above_before += found & 0xFFFF
        tied_before += found >> 16


def count(
    pieces: Pieces, state: Tensor, totals: Tensor, n_rows: int, k: int, kept: Candidates | None
) -> None:
    """Fill what `state` has for tensors, and `totals`, int64 `[groups, 2]`."""
    pieces.launch_on_groups(count_kernel, state, kept, (totals,), (n_rows, k))


def collect(
    pieces: Pieces,
    state: Tensor,
    totals: Tensor,
    output: Tensor,
    threshold: int,
    ties: int,
    kept: Candidates | None,
) -> None:
    """Write the selected positions of all tensors, one after the other, to `output`."""
    places = None if kept is None else kept.places
    tensors = places, totals, output
    pieces.launch_on_groups(collect_kernel, state, kept, tensors, (threshold, ties))


def shipped_variants() -> list[Variant]:
    """Count and collect, of candidates or of all scores."""
    types = dict.fromkeys(("table_ptr", "state_ptr", "totals_ptr"), "*i64")
    more = types | {"output_ptr": "*i64"}
    return [
        *variants_that_read("count", count_kernel, types),
        *variants_that_read("collect", collect_kernel, more, of_candidates={"places_ptr": "*i32"}),
    ]
