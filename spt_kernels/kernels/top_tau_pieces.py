"""How a selection cuts its scores, and what its kernels know of each piece.

Tensors are cut into tiles, tiles into fours. Fours with a score that may be selected, the
candidates, lie side by side in one buffer, those of a tile in order, the tiles as they came. A
group is what one program reads of a tensor: some tiles, of each all scores or its candidates alone.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .address_table import find_row, upload
from .card import cdiv
from .prepared_launch import load
from .variant import Variant

# Words of the table for each tensor: its first filter, its scores, its first group, its address,
# whether that is of bf16, and the most that it counts for
WORDS = tl.constexpr(6)


class Cut(NamedTuple):
    """Sizes of the pieces.

    Attributes:
        tile: scores of a tile, a power of two.
        filtered: tiles that a program filters, one after the other.
        grouped: tiles of a group, a multiple of `filtered`.
        slots: scores of each tile of a group that are looked at together.
    """

    tile: int
    filtered: int
    grouped: int
    slots: int

    @property
    def of_group(self) -> tuple[int, int, int]:
        """`TILE`, `TILES` and `SLOTS` of a kernel that reads groups."""
        return self.tile, self.grouped, self.slots


CUT = Cut(tile=2048, filtered=8, grouped=64, slots=32)
_WARPS = 8  # of a program that reads a group
_UNCAPPED = 2**62

# Kernels that have been launched, by all that Triton makes another one for
_loaded: dict[tuple[Any, ...], Any] = {}


@dataclass(frozen=True)
class Pieces:
    """Scores as the kernels find them.

    Attributes:
        cut: how large the pieces are.
        table: `WORDS` for each tensor, on the device.
        numels: of each tensor.
        numel: scores in all.
        is_capped: whether a tensor may count for less than it has.
        n_filters: programs of the filter.
        n_groups: programs of everything else.
    """

    cut: Cut
    table: Tensor
    numels: tuple[int, ...]
    numel: int
    is_capped: bool
    n_filters: int
    n_groups: int

    @property
    def device(self) -> torch.device:
        """Where the scores are."""
        return self.table.device

    @classmethod
    def of(cls, tensors: Sequence[Tensor], caps: Sequence[int]) -> Pieces:
        """Lay out contiguous tensors on one device, not none.

        Tensors that have been laid out before, and still are where they were, find their table on
        the device. Each stream has its own: on that it was written before it is read, and its
        memory is given to others only after.
        """
        device = tensors[0].device
        addresses = tuple(map(Tensor.data_ptr, tensors))
        numels = tuple(map(Tensor.numel, tensors))
        dtypes = tuple([tensor.dtype for tensor in tensors])
        layout = CUT, device, addresses, numels, dtypes, tuple(caps)
        if device.type != "cuda":
            return _laid_out(*layout, stream=0)
        if torch.cuda.is_current_stream_capturing():  # nothing is written until a replay
            return _laid_out.__wrapped__(*layout, stream=0)
        return _laid_out(*layout, stream=torch.cuda.current_stream(device).cuda_stream)

    def launch(
        self,
        kernel: Any,
        n_programs: int,
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        num_warps: int,
        of_candidates: bool = True,
    ) -> None:
        """Launch a kernel as the first selection has loaded it.

        Args:
            kernel: `@triton.jit` function, which specialises on none of its numbers.
            n_programs: the grid.
            arguments: of run time: tensors, whole allocations, which are aligned, of dtypes that
                the kernel knows; and numbers.
            constants: what is compiled in.
            num_warps: of a program.
            of_candidates: whether the pointers to candidates are there; else they are None.
        """
        # Triton's own object takes longer to hash than all the rest
        key = kernel.fn, self.table.get_device(), constants, of_candidates
        loaded = _loaded.get(key)
        if loaded is None:
            loaded = load(kernel, *arguments, *constants, num_warps=num_warps)
            _loaded[key] = loaded
        loaded(n_programs, *arguments, *constants)

    def launch_on_groups(
        self,
        kernel: Any,
        state: Tensor,
        kept: Candidates | None,
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[int, ...],
        constants: tuple[int, ...] = (),
    ) -> None:
        """Launch a kernel that reads groups: of candidates, or of all scores."""
        runs, scores, capacity = None, None, 0
        if kept is not None:
            runs, scores, capacity = kept.runs, kept.fours, kept.capacity
        self.launch(
            kernel,
            self.n_groups,
            (self.table, state, runs, scores, *tensors, len(self.numels), *numbers, capacity),
            (*constants, *self.cut.of_group),
            _WARPS,
            of_candidates=kept is not None,
        )


@functools.lru_cache(maxsize=8)
def _laid_out(
    cut: Cut,
    device: torch.device,
    addresses: tuple[int, ...],
    numels: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    caps: tuple[int, ...],
    stream: int,
) -> Pieces:
    """`Pieces.of` tensors that are told by all that their table holds, on one stream."""
    is_capped = any(map(operator.lt, caps, numels))
    if not is_capped:
        caps = (_UNCAPPED,) * len(numels)
    words: list[int] = []
    n_filters = n_groups = 0
    for address, numel, dtype, cap in zip(addresses, numels, dtypes, caps, strict=True):
        words += (n_filters, numel, n_groups, address, dtype is torch.bfloat16, cap)
        n_filters += cdiv(numel, cut.tile * cut.filtered)
        n_groups += cdiv(numel, cut.tile * cut.grouped)
    table = torch.tensor(words, dtype=torch.int64, device="cpu").view(-1, WORDS.value)
    return Pieces(cut, upload(table, device), numels, sum(numels), is_capped, n_filters, n_groups)


@dataclass(frozen=True)
class Candidates:
    """Fours of scores among which everything that can be selected is, unless there are too many.

    Attributes:
        runs: of each tile the first of its fours, times 2¹⁶, and their number: int64 `[tiles]`.
        fours: bits of the scores: int32 `[capacity, 4]`.
        places: of each four in its tile: int32 `[capacity]`.
    """

    runs: Tensor
    fours: Tensor
    places: Tensor

    @property
    def capacity(self) -> int:
        """Fours that there is room for."""
        return len(self.places)


@triton.jit
def load_bits(address, is_bf16, offsets, mask):
    """Scores as uint32 that order as they do; a bf16 is the upper half of an fp32."""
    if is_bf16 != 0:
        half_ptr = address.to(tl.pointer_type(tl.uint16))
        bits = tl.load(half_ptr + offsets, mask=mask, other=0).to(tl.uint32) << 16
    else:
        bits = tl.load(address.to(tl.pointer_type(tl.uint32)) + offsets, mask=mask, other=0)
    return bits


@triton.jit
def group_of(table_ptr, n_tensors, TILE: tl.constexpr, TILES: tl.constexpr):
    """Of this program's group its tensor, the row of that, and its first score in it."""
    tensor = find_row(table_ptr + 2, n_tensors, WORDS)
    row_ptr = table_ptr + tensor.to(tl.int64) * WORDS
    origin = (tl.program_id(0) - tl.load(row_ptr + 2)) * (TILES * TILE)
    return tensor, row_ptr, origin


@triton.jit
def runs_of(row_ptr, origin, runs_ptr, capacity, TILE: tl.constexpr, TILES: tl.constexpr):
    """Where the scores of each tile of a group lie, and how many there are.

    Without runs of candidates they are all scores, from the group's first one on.
    """
    left = tl.load(row_ptr + 1) - origin - tl.arange(0, TILES) * TILE
    if runs_ptr is None:
        at = tl.arange(0, TILES) * TILE
        length = tl.minimum(tl.maximum(left, 0), TILE)
    else:
        tile = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
        run = tl.load(runs_ptr + tile, mask=left > 0, other=0)
        at, fours = run >> 16, run & 0xFFFF
        length = tl.where(at + fours > capacity, 0, fours * 4)  # there was no room for them
        at *= 4
    return at, length.to(tl.int32)


@triton.jit
def read_runs(row_ptr, origin, scores_ptr, at, length, slots, low):
    """Bits of some scores of each tile of a group, 0 for those that are 0, below `low` or no more.

    What is no score, NaN, infinite or negative, has bits above all scores.
    """
    inside = slots < length[:, None]
    offsets = at[:, None] + slots
    if scores_ptr is None:
        is_bf16 = tl.load(row_ptr + 4)
        address = tl.load(row_ptr + 3) + origin * (4 - 2 * is_bf16)
        bits = load_bits(address, is_bf16, offsets, inside)
    else:
        bits = tl.load(scores_ptr + offsets, mask=inside, other=0).to(tl.uint32, bitcast=True)
    return tl.where((bits < low) | (bits == 0x80000000), 0, bits).to(tl.uint32)


def variants_that_read(
    name: str,
    kernel: Any,
    types: Mapping[str, str],
    constexprs: Mapping[str, Any] | None = None,
    of_candidates: Mapping[str, str] | None = None,
) -> list[Variant]:
    """Both variants of a kernel that reads groups; `of_candidates` are pointers to those alone."""
    pointers = {"runs_ptr": "*i64", "scores_ptr": "*i32", **(of_candidates or {})}
    groups = dict(zip(("TILE", "TILES", "SLOTS"), CUT.of_group, strict=True))
    sizes = groups | dict(constexprs or {})
    of_all = sizes | dict.fromkeys(pointers)
    return [
        Variant(f"{name}-candidates", kernel, {**types, **pointers}, sizes, _WARPS),
        Variant(f"{name}-all", kernel, types, of_all, _WARPS),
    ]
