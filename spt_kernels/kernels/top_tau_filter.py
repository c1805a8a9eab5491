"""Triton kernels that guess from a sample what can be selected, and keep it in one pass."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .address_table import find_row
from .sparse_adamw import mix
from .top_tau_pieces import CUT, WORDS, Candidates, Pieces, load_bits
from .variant import Variant

# Scores that one program draws, of each tensor as many, and holds in registers while it searches
_SAMPLES, _ROWS, _GUESS_WARPS = 1 << 14, (1, 4, 16, 64, 256, 1024), 16
_DRAW_BLOCK, _DRAW_WARPS = 256, 2
# How cautious the guess is: standard deviations of the sample that are allowed for
_DEVIATIONS = 4.0
# Up to so many scores all of them may be candidates
_FEW = 1 << 20
_FILTER_WARPS = 4


@triton.jit(do_not_specialize=["n_tensors"])
def draw_kernel(table_ptr, drawn_ptr, n_tensors, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """drawn[i, m] = the bits of one score of tensor m at random, of each of DRAWN equal parts.

    A fixed step could follow a column of a matrix.
    """
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, part = sample % ROWS, sample // ROWS
    row_ptr = table_ptr + row * WORDS
    known = row < n_tensors
    step = tl.load(row_ptr + 1, mask=known, other=0) // (BLOCK * tl.num_programs(0) // ROWS)
    address = tl.load(row_ptr + 3, mask=known, other=0)
    is_bf16 = tl.load(row_ptr + 4, mask=known, other=0)

    at = step * part + tl.umulhi(mix(sample.to(tl.uint32)), step.to(tl.uint32))
    half_ptr = address.to(tl.pointer_type(tl.uint16)) + at
    full_ptr = address.to(tl.pointer_type(tl.uint32)) + at
    bits = tl.load(half_ptr, mask=(step > 0) & (is_bf16 != 0), other=0).to(tl.uint32) << 16
    bits |= tl.load(full_ptr, mask=(step > 0) & (is_bf16 == 0), other=0)
    tl.store(drawn_ptr + sample, bits.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["n_tensors"])
def guess_kernel(
    table_ptr,
    drawn_ptr,
    state_ptr,
    n_tensors,
    wanted,
    ROWS: tl.constexpr,
    DRAWN: tl.constexpr,
):
    """state[0] = the highest score of which, and of more, the sample says `wanted` can be counted.

    One program holds the sample in registers and finds a bit of the answer after the other.
    """
    row = tl.arange(0, ROWS)
    row_ptr = table_ptr + row * WORDS
    numel = tl.load(row_ptr + 1, mask=row < n_tensors, other=0).to(tl.float32)
    cap = tl.load(row_ptr + 5, mask=row < n_tensors, other=0).to(tl.float32)
    weight = tl.maximum(numel / DRAWN, 1.0)  # scores that each drawn stands for
    # a negative zero is a negative integer
    bits = tl.load(drawn_ptr + tl.arange(0, DRAWN)[:, None] * ROWS + row[None, :])

    low = 0
    for i in range(31):
        higher = low | (1 << (30 - i))
        counted = tl.minimum(tl.sum((bits >= higher).to(tl.int32), 0) * weight, cap)
        low = tl.where(tl.sum(counted, 0) >= wanted, higher, low)
    tl.store(state_ptr, tl.maximum(low, 1).to(tl.int64))


@triton.jit
def load_tile(address, is_bf16, start, left, TILE: tl.constexpr):
    """The bits of a tile, `[TILE / 4, 4]` uint32, by whole words of memory where that can be."""
    offsets = tl.arange(0, TILE // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    if (left >= TILE) & (address % 16 == 0):
        if is_bf16 != 0:
            half_ptr = tl.multiple_of(address.to(tl.pointer_type(tl.uint16)), 16) + start
            bits = tl.load(half_ptr + offsets).to(tl.uint32) << 16
        else:
            full_ptr = tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), 16) + start
            bits = tl.load(full_ptr + offsets)
    else:
        bits = load_bits(address + start * (4 - 2 * is_bf16), is_bf16, offsets, offsets < left)
    return bits


@triton.jit(do_not_specialize=["n_tensors", "capacity"])
def filter_kernel(
    table_ptr,
    state_ptr,
    runs_ptr,
    fours_ptr,
    places_ptr,
    n_tensors,
    capacity: tl.int64,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """Keeps the fours of scores of which one is not below state[0]; state[1] counts them.

    Tiles lie as their programs come, so that none waits for another; `runs` tells where. By fours
    it is done at the speed of memory: a program has a quarter of the work, and stores whole words.
    """
    row_ptr = table_ptr + find_row(table_ptr, n_tensors, WORDS).to(tl.int64) * WORDS
    first_tile = (tl.program_id(0) - tl.load(row_ptr)) * TILES
    numel = tl.load(row_ptr + 1)
    own_runs_ptr = runs_ptr + tl.load(row_ptr + 2) * GROUPED
    address = tl.load(row_ptr + 3)
    is_bf16 = tl.load(row_ptr + 4)
    low = tl.load(state_ptr).to(tl.uint32)

    place = tl.arange(0, TILE // 4)
    for i in range(TILES):
        tile = first_tile + i
        left = numel - tile * TILE
        if left > 0:
            bits = load_tile(address, is_bf16, tile * TILE, left, TILE)
            kept = (tl.max(bits, 1) >= low).to(tl.int32)
            n = tl.sum(kept, 0).to(tl.int64)
            rank = tl.cumsum(kept, 0) - kept
            first = tl.atomic_add(state_ptr + 1, n, sem="relaxed")
            tl.store(own_runs_ptr + tile, first << 16 | n)
            if (n > 0) & (first + n <= capacity):
                tl.store(places_ptr + first + rank, place, mask=kept > 0)
                offsets = rank[:, None] * 4 + tl.arange(0, 4)[None, :]
                tl.store(fours_ptr + first * 4 + offsets, bits, mask=kept[:, None] > 0)


def keep_candidates(pieces: Pieces, k: int, state: Tensor) -> Candidates | None:
    """Guess and filter; None where a sample says too little or most of the scores would stay."""
    n_tensors, numel, cut = len(pieces.numels), pieces.numel, pieces.cut
    rows = next((rows for rows in _ROWS if rows >= n_tensors), 0)
    if not rows:
        return None
    weight = max(1.0, max(pieces.numels) * rows / _SAMPLES)  # scores that one drawn stands for
    wanted = k + _DEVIATIONS * (math.sqrt(k * weight) + 3 * weight)
    if numel <= _FEW:
        capacity = numel // 4 + n_tensors
    elif wanted <= numel / 32:
        # scores past a cap are selected, but do not count
        capacity = min(int(wanted) * (4 if pieces.is_capped else 2), numel // 16)
    else:
        return None

    table, device = pieces.table, pieces.device
    drawn = torch.empty(_SAMPLES, dtype=torch.int32, device=device)  # [samples of each, rows]
    pieces.launch(
        draw_kernel,
        _SAMPLES // _DRAW_BLOCK,
        (table, drawn, n_tensors),
        (rows, _DRAW_BLOCK),
        _DRAW_WARPS,
    )
    pieces.launch(
        guess_kernel,
        1,
        (table, drawn, state, n_tensors, wanted),
        (rows, _SAMPLES // rows),
        _GUESS_WARPS,
    )
    kept = Candidates(
        torch.empty(pieces.n_groups * cut.grouped, dtype=torch.int64, device=device),
        torch.empty(capacity, 4, dtype=torch.int32, device=device),
        torch.empty(capacity, dtype=torch.int32, device=device),
    )
    pieces.launch(
        filter_kernel,
        pieces.n_filters,
        (table, state, kept.runs, kept.fours, kept.places, n_tensors, capacity),
        (cut.tile, cut.filtered, cut.grouped),
        _FILTER_WARPS,
    )
    return kept


def shipped_variants() -> list[Variant]:
    """A draw and a guess for each number of rows, and the filter; dtypes are told at run time."""
    pointers = dict.fromkeys(("table_ptr", "state_ptr", "runs_ptr"), "*i64")
    draws = [
        Variant(
            name=f"draw-{rows}",
            kernel=draw_kernel,
            types={"table_ptr": "*i64", "drawn_ptr": "*i32"},
            constexprs={"ROWS": rows, "BLOCK": _DRAW_BLOCK},
            num_warps=_DRAW_WARPS,
        )
        for rows in _ROWS
    ]
    guesses = [
        Variant(
            name=f"guess-{rows}",
            kernel=guess_kernel,
            types={
                "table_ptr": "*i64",
                "drawn_ptr": "*i32",
                "state_ptr": "*i64",
                "wanted": "fp32",
            },
            constexprs={"ROWS": rows, "DRAWN": _SAMPLES // rows},
            num_warps=_GUESS_WARPS,
        )
        for rows in _ROWS
    ]
    keeping = Variant(
        name="filter",
        kernel=filter_kernel,
        types=pointers | {"fours_ptr": "*i32", "places_ptr": "*i32"},
        constexprs={"TILE": CUT.tile, "TILES": CUT.filtered, "GROUPED": CUT.grouped},
        num_warps=_FILTER_WARPS,
        load_bits=128,
        store_bits=128,
        programs_per_sm=6,
    )
    return [*draws, *guesses, keeping]
