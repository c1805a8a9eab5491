"""Triton kernels of top-τ: radix histograms of all tensors, then an ordered collect."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from .address_table import address_table, find_row, upload
from .variant import Variant

# A program counts _TILES tiles before it touches the histogram that all programs share
_TILE, _TILES, _WARPS = 2048, 16, 8

# Non-negative floats order as their bits: sign, exponent and two bits of mantissa are the first
# digit, which also tells scores that are not finite or negative; digits of 11 and 10 bits follow.
# A digit of 12 bits is too much for Triton 3.6, whose histogram of it spills registers.
_SHIFTS = (32, 21, 10, 0)
_FIRST_NOT_FINITE = 0x7F800000 >> 21


@triton.jit
def load_bits(address, is_bf16, offsets, mask):
    """Scores as uint32 that order as they do; a bf16 is the upper half of an fp32."""
    if is_bf16 != 0:
        half_ptr = address.to(tl.pointer_type(tl.uint16))
        bits = tl.load(half_ptr + offsets, mask=mask, other=0).to(tl.uint32) << 16
    else:
        bits = tl.load(address.to(tl.pointer_type(tl.uint32)) + offsets, mask=mask, other=0)
    return bits


@triton.jit(do_not_specialize=["n_tensors", "prefix"])
def histogram_kernel(
    table_ptr,
    histogram_ptr,
    n_tensors,
    prefix,
    PREFIX_SHIFT: tl.constexpr,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """histogram[m, d] += scores of tensor m above zero with this prefix of bits, then digit d."""
    tensor = find_row(table_ptr, n_tensors, 4).to(tl.int64)
    row_ptr = table_ptr + tensor * 4
    start = (tl.program_id(0) - tl.load(row_ptr)) * (TILE * TILES)
    numel = tl.load(row_ptr + 1)
    address = tl.load(row_ptr + 2)
    is_bf16 = tl.load(row_ptr + 3)

    counts = tl.zeros([BINS], tl.int32)
    for tile in range(TILES):
        offsets = start + tile * TILE + tl.arange(0, TILE)
        bits = load_bits(address, is_bf16, offsets, offsets < numel)
        counted = (bits & 0x7FFFFFFF) != 0
        if PREFIX_SHIFT < 32:
            counted &= (bits >> PREFIX_SHIFT) == prefix.to(tl.uint32)
        digits = ((bits >> SHIFT) & (BINS - 1)).to(tl.int32)
        counts += tl.histogram(digits, BINS, mask=counted)

    bins = tl.arange(0, BINS)
    # integers: the sum is the same in whatever order the programs come
    tl.atomic_add(
        histogram_ptr + tensor * BINS + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed"
    )


@triton.jit(do_not_specialize=["n_tensors", "threshold"])
def count_kernel(
    table_ptr, count_ptr, n_tensors, threshold, TILE: tl.constexpr, TILES: tl.constexpr
):
    """count[program] = how many of its scores are above the threshold, and how many are equal."""
    row_ptr = table_ptr + find_row(table_ptr, n_tensors, 6).to(tl.int64) * 6
    start = (tl.program_id(0) - tl.load(row_ptr)) * (TILE * TILES)
    numel = tl.load(row_ptr + 1)
    address = tl.load(row_ptr + 2)
    is_bf16 = tl.load(row_ptr + 3)

    above = tl.zeros([TILE], tl.int32)
    tied = tl.zeros([TILE], tl.int32)
    for tile in range(TILES):
        offsets = start + tile * TILE + tl.arange(0, TILE)
        bits = load_bits(address, is_bf16, offsets, offsets < numel).to(tl.int32, bitcast=True)
        above += (bits > threshold).to(tl.int32)  # a negative zero is a negative integer
        tied += (bits == threshold).to(tl.int32)

    program = tl.program_id(0).to(tl.int64)
    tl.store(count_ptr + program * 2, tl.sum(above, 0).to(tl.int64))
    tl.store(count_ptr + program * 2 + 1, tl.sum(tied, 0).to(tl.int64))


@triton.jit(do_not_specialize=["n_tensors", "threshold"])
def collect_kernel(
    table_ptr, before_ptr, n_tensors, threshold, TILE: tl.constexpr, TILES: tl.constexpr
):
    """Positions of the scores above the threshold and of the first `ties`, in order."""
    row_ptr = table_ptr + find_row(table_ptr, n_tensors, 6).to(tl.int64) * 6
    first = tl.load(row_ptr)
    start = (tl.program_id(0) - first) * (TILE * TILES)
    numel = tl.load(row_ptr + 1)
    address = tl.load(row_ptr + 2)
    is_bf16 = tl.load(row_ptr + 3)
    output_ptr = tl.load(row_ptr + 4).to(tl.pointer_type(tl.int64))
    ties = tl.load(row_ptr + 5)

    # what earlier programs of the same tensor found
    program = tl.program_id(0).to(tl.int64)
    above_before = tl.load(before_ptr + program * 2) - tl.load(before_ptr + first * 2)
    tied_before = tl.load(before_ptr + program * 2 + 1) - tl.load(before_ptr + first * 2 + 1)
    written = above_before + tl.minimum(tied_before, ties)

    for tile in range(TILES):
        offsets = start + tile * TILE + tl.arange(0, TILE)
        bits = load_bits(address, is_bf16, offsets, offsets < numel).to(tl.int32, bitcast=True)
        tied = (bits == threshold).to(tl.int32)
        tied_rank = tied_before + tl.cumsum(tied, 0) - tied
        chosen = (bits > threshold) | ((tied > 0) & (tied_rank < ties))
        place = written + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(output_ptr + place, offsets, mask=chosen)
        written += tl.sum(chosen.to(tl.int32), 0)
        tied_before += tl.sum(tied, 0)


def top_tau(tensors: Sequence[Tensor], k: int, caps: Sequence[int]) -> list[Tensor]:
    """See `spt_kernels.ops.top_tau.top_tau`; tensors are contiguous, on one device, not none.

    The host reads three small histograms: selection is not part of a training step.
    """
    limits = torch.tensor(caps)  # [tensors]
    above = torch.zeros(len(tensors), dtype=torch.int64)  # [tensors] scores above the threshold
    tied = torch.zeros_like(above)  # [tensors] scores equal to it
    threshold = 0
    for prefix_shift, shift in pairwise(_SHIFTS):
        histogram = _histogram(tensors, threshold, prefix_shift, shift)
        if shift == _SHIFTS[1] and histogram[:, _FIRST_NOT_FINITE:].any():
            raise ValueError("scores must be finite and not negative")
        # [tensors, bins] scores that a threshold at each bin would select, ties included
        selected = above[:, None] + histogram.flip(1).cumsum(1).flip(1)
        reached = torch.minimum(selected, limits[:, None]).sum(0)  # [bins] never rises
        if k > int(reached[0]):
            raise ValueError(f"k is {k}, but only {int(reached[0])} positive scores can be counted")
        if k == 0:
            return [tensor.new_empty(0, dtype=torch.int64) for tensor in tensors]
        digit = int((reached >= k).sum()) - 1
        threshold = threshold << (prefix_shift - shift) | digit
        tied = histogram[:, digit]
        above = selected[:, digit] - tied
    taken = _share_ties(above.tolist(), tied.tolist(), list(caps), k)
    return _collect(tensors, threshold, above.tolist(), taken)


def _histogram(tensors: Sequence[Tensor], prefix: int, prefix_shift: int, shift: int) -> Tensor:
    bins = 1 << (prefix_shift - shift)
    device = tensors[0].device
    histogram = torch.zeros(len(tensors), bins, dtype=torch.int64, device=device)
    table, n_programs = _table(tensors)
    if n_programs:
        histogram_kernel[(n_programs,)](
            table,
            histogram,
            n_tensors=len(tensors),
            prefix=prefix,
            PREFIX_SHIFT=prefix_shift,
            SHIFT=shift,
            BINS=bins,
            TILE=_TILE,
            TILES=_TILES,
            num_warps=_WARPS,
        )
    return histogram.cpu()


def _table(tensors: Sequence[Tensor], *more: Sequence[Tensor | int]) -> tuple[Tensor, int]:
    """On the device a row for each tensor, and the number of programs."""
    kinds = [int(tensor.dtype == torch.bfloat16) for tensor in tensors]
    numels = [tensor.numel() for tensor in tensors]
    table, n_programs = address_table(numels, _TILE * _TILES, [tensors, kinds, *more])
    return upload(table, tensors[0].device), n_programs


def _share_ties(above: list[int], tied: list[int], caps: list[int], k: int) -> list[int]:
    """How many of its tied scores each tensor gives, the earlier first, until k is met."""
    missing = k - sum(map(min, above, caps))
    taken = []
    for n_above, n_tied, cap in zip(above, tied, caps, strict=True):
        counted = min(n_above + n_tied, cap) - min(n_above, cap)
        if counted < missing:
            taken.append(n_tied)
            missing -= counted
        else:
            taken.append(missing)
            missing = 0
    return taken


def _collect(
    tensors: Sequence[Tensor], threshold: int, above: list[int], ties: list[int]
) -> list[Tensor]:
    device = tensors[0].device
    outputs = [
        torch.empty(n_above + n_ties, dtype=torch.int64, device=device)  # [selected]
        for n_above, n_ties in zip(above, ties, strict=True)
    ]
    table, n_programs = _table(tensors, outputs, ties)
    counts = torch.empty(n_programs, 2, dtype=torch.int64, device=device)
    tiles = _half_tiles() | {"num_warps": _WARPS}
    n_tensors = len(tensors)
    count_kernel[(n_programs,)](table, counts, n_tensors=n_tensors, threshold=threshold, **tiles)
    before = counts.cumsum(0) - counts  # [programs, 2]
    collect_kernel[(n_programs,)](table, before, n_tensors=n_tensors, threshold=threshold, **tiles)
    return outputs


def _half_tiles() -> dict[str, int]:
    """As many scores a program as a histogram's, in tiles of half the size.

    A thread then holds the positions of four scores instead of eight, in so many fewer registers
    that twice as many programs are resident. A histogram would pay for each tile with its bins.
    """
    return {"TILE": _TILE // 2, "TILES": _TILES * 2}


def shipped_variants() -> list[Variant]:
    """A histogram for each digit, then count and collect; fp32 and bf16 are told at run time."""
    tiles = {"TILE": _TILE, "TILES": _TILES}
    histograms = [
        Variant(
            name=f"histogram-bits-{shift}-{prefix_shift}",
            kernel=histogram_kernel,
            types={"table_ptr": "*i64", "histogram_ptr": "*i64"},
            constexprs=tiles
            | {"PREFIX_SHIFT": prefix_shift, "SHIFT": shift, "BINS": 1 << (prefix_shift - shift)},
            num_warps=_WARPS,
        )
        for prefix_shift, shift in pairwise(_SHIFTS)
    ]
    ordered = [
        Variant(
            name=name,
            kernel=kernel,
            types={"table_ptr": "*i64", pointer: "*i64"},
            constexprs=_half_tiles(),
            num_warps=_WARPS,
        )
        for name, kernel, pointer in (
            ("count", count_kernel, "count_ptr"),
            ("collect", collect_kernel, "before_ptr"),
        )
    ]
    return histograms + ordered
