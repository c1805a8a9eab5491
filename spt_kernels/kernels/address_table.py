"""The table of addresses through which one launch reaches many tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import cdiv
from .variant import Variant

_WORDS_PER_LAUNCH = 16


@triton.jit
def find_row(table_ptr, n_rows, WORDS: tl.constexpr):
    """The row that this program works on: the last whose first program is not a later one.

    A search of a few cached loads instead of a map from programs to rows, which would have to
    travel to the device with every launch.
    """
    program = tl.program_id(0).to(tl.int64)
    row = 0
    end = n_rows
    while end - row > 1:
        middle = (row + end) // 2
        later = tl.load(table_ptr + middle.to(tl.int64) * WORDS) > program
        row = tl.where(later, row, middle)
        end = tl.where(later, middle, end)
    return row


@triton.jit(do_not_specialize=[f"w{n}" for n in range(_WORDS_PER_LAUNCH)])
def place_words_kernel(
    output_ptr,
    w0: tl.int64,
    w1: tl.int64,
    w2: tl.int64,
    w3: tl.int64,
    w4: tl.int64,
    w5: tl.int64,
    w6: tl.int64,
    w7: tl.int64,
    w8: tl.int64,
    w9: tl.int64,
    w10: tl.int64,
    w11: tl.int64,
    w12: tl.int64,
    w13: tl.int64,
    w14: tl.int64,
    w15: tl.int64,
):
    """Sixteen words from the arguments of the launch to memory."""
    tl.store(output_ptr + 0, w0)
    tl.store(output_ptr + 1, w1)
    tl.store(output_ptr + 2, w2)
    tl.store(output_ptr + 3, w3)
    tl.store(output_ptr + 4, w4)
    tl.store(output_ptr + 5, w5)
    tl.store(output_ptr + 6, w6)
    tl.store(output_ptr + 7, w7)
    tl.store(output_ptr + 8, w8)
    tl.store(output_ptr + 9, w9)
    tl.store(output_ptr + 10, w10)
    tl.store(output_ptr + 11, w11)
    tl.store(output_ptr + 12, w12)
    tl.store(output_ptr + 13, w13)
    tl.store(output_ptr + 14, w14)
    tl.store(output_ptr + 15, w15)


def address_table(
    numels: Sequence[int], block: int, columns: Sequence[Sequence[Tensor | int]]
) -> tuple[Tensor, int]:
    """Lay out a launch over many tensors, with programs of `block` elements that never share one.

    Args:
        numels: elements of each row.
        block: elements per program.
        columns: what the kernel needs of each row: tensors, of which it gets the address, or ints.

    Returns:
        The table, int64 `[rows, 2 + columns]` on the CPU, whose first two words are the row's first
        program and its elements; and the number of programs.
    """
    table, n_programs = [], 0
    for numel, *row in zip(numels, *columns, strict=True):
        words = [word.data_ptr() if isinstance(word, Tensor) else word for word in row]
        table.append([n_programs, numel, *words])
        n_programs += -(-numel // block)  # `triton.cdiv` takes as long as the rest of the row
    return torch.tensor(table, dtype=torch.int64, device="cpu"), n_programs


def upload(table: Tensor, device: torch.device) -> Tensor:
    """A copy of a small CPU tensor of 8-byte elements on `device`, without waiting for that."""
    if device.type != "cuda":
        return table  # the interpreter reads host memory
    if torch.cuda.is_current_stream_capturing():
        return upload_as_arguments(table, device)
    return table.pin_memory().to(device, non_blocking=True)


class SmallTable:
    """Words that stay where they are on the device and are copied there when they have changed."""

    def __init__(self, n_words: int, device: torch.device) -> None:
        self._there = torch.empty(n_words, dtype=torch.int64, device=device)
        self._words: list[int] = []

    def on_device(self, words: list[int]) -> Tensor:
        """These words on the device, without waiting for it.

        While a CUDA graph is captured they are in memory of the graph's own, which nothing but its
        replays writes.
        """
        there = self._there
        if there.is_cuda and torch.cuda.is_current_stream_capturing():
            return upload_as_arguments(torch.tensor(words, device="cpu"), there.device)
        if words != self._words:
            here = torch.tensor(words, device="cpu")
            there.copy_(here.pin_memory() if there.is_cuda else here, non_blocking=True)
            self._words = words
        return there


def upload_as_arguments(table: Tensor, device: torch.device) -> Tensor:
    """`upload` as arguments of launches, for what a CUDA graph may hold.

    A graph keeps the arguments of its launches; host memory would have to outlive it.
    """
    words = table.reshape(-1).view(torch.int64).tolist()
    padded = cdiv(len(words), _WORDS_PER_LAUNCH) * _WORDS_PER_LAUNCH
    output = torch.empty(padded, dtype=torch.int64, device=device)  # [words, rounded up]
    words += [0] * (padded - len(words))
    for start in range(0, padded, _WORDS_PER_LAUNCH):
        part = words[start : start + _WORDS_PER_LAUNCH]
        place_words_kernel[(1,)](output[start:], *part, num_warps=1)
    return output[: table.numel()].view(table.dtype).view(table.shape)


@functools.cache
def load_for_capture(device: torch.device) -> None:
    """Load what `upload_as_arguments` launches: no graph can hold the first launch of a kernel."""
    with torch.cuda.device(device):
        upload_as_arguments(torch.zeros(1, dtype=torch.int64, device="cpu"), device)


def shipped_variants() -> list[Variant]:
    """The one kernel here; arguments are words of any value."""
    types = {"output_ptr": "*i64"}
    return [Variant("place_words", place_words_kernel, types, constexprs={}, num_warps=1)]
