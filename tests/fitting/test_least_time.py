"""One level for each block, against every choice there is."""

from __future__ import annotations

import itertools
import random

from spt_kernels.fitting.least_time import BlockLevel, least_room, least_time

UNIT = 2**16


def takes(blocks: list[list[BlockLevel]], levels: tuple[int, ...]) -> tuple[int, float]:
    """Bytes at the highest moment, and seconds, of a choice."""
    kept, highest, seconds = 0, 0, 0.0
    for own, level in zip(blocks, levels, strict=True):
        highest = max(highest, kept + own[level].most_bytes)
        kept += own[level].kept_bytes
        seconds += own[level].seconds
    return highest, seconds


def made_up(seed: int) -> list[list[BlockLevel]]:
    drawn = random.Random(seed)
    blocks = []
    for _ in range(drawn.randint(1, 4)):
        levels = []
        for _ in range(drawn.randint(1, 4)):
            kept = drawn.randint(0, 9) * UNIT
            most = kept + drawn.randint(0, 9) * UNIT
            levels.append(BlockLevel(kept, most, drawn.randint(0, 64) / 64))
        blocks.append(levels)
    return blocks


def test_no_other_choice_that_fits_is_faster() -> None:
    n_choices = 0
    for seed in range(100):
        blocks = made_up(seed)
        every = itertools.product(*(range(len(levels)) for levels in blocks))
        taken = [takes(blocks, levels) for levels in every]
        least = min(highest for highest, _ in taken)
        assert least_room(blocks) == max(least, UNIT)
        for room in (least - 1, least, least + 3 * UNIT, least + 20 * UNIT):
            fitting = [seconds for highest, seconds in taken if highest <= room]
            chosen = least_time(blocks, room)
            assert (chosen is None) == (not fitting)
            if chosen is not None:
                n_choices += 1
                highest, seconds = takes(blocks, chosen)
                assert highest <= room
                assert seconds == min(fitting)
    assert n_choices > 250
