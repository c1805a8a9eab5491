"""What the kernels of a low-rank update share: what they drop, and how large their blocks are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .card import INTERPRETED

# Columns of a factor: beyond these registers spill, and a library's product is the better one; as
# `ops.low_rank_ways`, which tells of it without Triton, has them
MOST_COLUMNS = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
ACROSS = 64  # of a block: fewer would leave Hopper's units for products unused
_LEAST_COLUMNS = 16  # of a factor in a product of tensor cores


class Dropped(NamedTuple):
    """Which elements of an activation a kernel drops, by the words of `reference.low_rank`.

    Attributes:
        words: both of the key, and the threshold: 0 drops none.
        key: int64 `[2]`, the key in memory, in place of that in `words`.
    """

    words: tuple[int, int, int]
    key: Tensor | None = None

    @property
    def constants(self) -> tuple[bool, bool]:
        """What is compiled in: whether any are dropped, and whether the key is in memory."""
        return self.words[2] > 0, self.key is not None


def depth_and_columns(dtype: torch.dtype, rank: int) -> tuple[int, int]:
    """How much of a sum a program takes at a time, and how many columns of a factor."""
    columns = max(_LEAST_COLUMNS, triton.next_power_of_2(rank))
    # values of fp32 are in registers three times over (tf32x3 splits each)
    return ACROSS // 2 if dtype == torch.float32 or columns > 32 else ACROSS, columns


def constants_of(tokens: int, features: int, columns: int) -> dict[str, Any]:
    """The last constants of every kernel, in their order."""
    return {
        "BLOCK_TOKENS": tokens,
        "BLOCK_FEATURES": features,
        "BLOCK_RANK": columns,
        "UPCAST": INTERPRETED,
    }


def shipped_sizes() -> Iterator[tuple[torch.dtype, int]]:
    """Each dtype with the fewest columns, and with the most; the two of 16 bits have one code."""
    for dtype, most in MOST_COLUMNS.items():
        yield dtype, _LEAST_COLUMNS
        if dtype != torch.float16:
            yield dtype, most
