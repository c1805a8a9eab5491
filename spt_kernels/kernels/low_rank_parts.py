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
# Tokens of a block. From 64 on Triton takes Hopper's own products, for which a factor goes through
# shared memory once more, behind a fence that seems to wait for what was asked for ahead: an H200
# then read at a quarter of its memory's speed.
TOKENS = 32
_LEAST_COLUMNS = 16  # of a factor in a product of tensor cores
_USUAL_RANK = 8


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


def blocks_of(dtype: torch.dtype, rank: int, *, is_made: bool = False) -> dict[str, Any]:
    """The last constants of every kernel, in their order: sizes of its blocks.

    Args:
        dtype: of the product's sides.
        rank: columns of the factor.
        is_made: whether the activation is made on the way, of something else.
    """
    columns = max(_LEAST_COLUMNS, triton.next_power_of_2(rank))
    # 8 KB of an activation at a time, half where registers hold much besides; values of fp32 are
    # in registers three times over (tf32x3 splits each)
    features = 64 if dtype == torch.float32 else 128
    if is_made or columns == MOST_COLUMNS[dtype]:
        features //= 2
    return {
        "BLOCK_TOKENS": TOKENS,
        "BLOCK_FEATURES": features,
        "BLOCK_RANK": columns,
        "UPCAST": INTERPRETED,
    }


def shipped_ranks() -> Iterator[tuple[torch.dtype, int]]:
    """Each dtype with the usual rank, and with the most; the two of 16 bits have one code."""
    for dtype, most in MOST_COLUMNS.items():
        yield dtype, _USUAL_RANK
        if dtype != torch.float16:
            yield dtype, most
