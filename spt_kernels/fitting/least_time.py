"""`least_time`: one level for each block, so that a step fits into a memory in the least time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_UNIT = 2**16  # bytes are told apart in steps of this, rounded up


class BlockLevel(NamedTuple):
    """What a block takes at one level.

    Attributes:
        kept_bytes: that its forward leaves behind.
        most_bytes: alive at once while it computes, beyond what was there before its forward.
        seconds: of its backward.
    """

    kept_bytes: int
    most_bytes: int
    seconds: float


class _Prefix(NamedTuple):
    """The best choices for the first blocks that keep no more than so much."""

    kept: int
    seconds: float
    levels: tuple[int, ...]


def least_time(blocks: Sequence[Sequence[BlockLevel]], room_bytes: int) -> tuple[int, ...] | None:
    """The level of each block for which all of them take the least time; None where none fits.

    A block's backward meets what the blocks before it have kept, as those after it are done with:
    the sum of what the first blocks keep, and the most that the next one has alive, may be at most
    `room_bytes`, for every block. This is a multiple-choice knapsack whose capacity is checked at
    every item; of all choices for the first blocks only those are gone on with that no other choice
    beats in both memory and time, which leaves the optimum (but for what rounds bytes up).

    Args:
        blocks: of each, in the order of the forward, the levels that it has.
        room_bytes: beside what is there before the first block.
    """
    room = room_bytes // _UNIT
    front = [_Prefix(0, 0.0, ())]
    for levels in blocks:
        found = [
            _Prefix(prefix.kept + _units(own.kept_bytes), prefix.seconds + own.seconds, chosen)
            for prefix in front
            for chosen, own in (((*prefix.levels, place), own) for place, own in enumerate(levels))
            if prefix.kept + _units(own.most_bytes) <= room
        ]
        front = _not_beaten(found)
    return min(front, key=lambda prefix: prefix.seconds).levels if front else None


def least_room(blocks: Sequence[Sequence[BlockLevel]]) -> int:
    """The fewest bytes for which `least_time` has a choice."""
    most = sum(max(own.most_bytes for own in levels) for levels in blocks)
    low, high = 0, _units(most) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if least_time(blocks, middle * _UNIT) else (middle, high)
    return high * _UNIT


def _units(n_bytes: int) -> int:
    return -(-n_bytes // _UNIT)


def _not_beaten(prefixes: list[_Prefix]) -> list[_Prefix]:
    """Those that no other one equals or beats in both memory and time."""
    front: list[_Prefix] = []
    for prefix in sorted(prefixes):
        if not front or prefix.seconds < front[-1].seconds:
            front.append(prefix)
    return front
