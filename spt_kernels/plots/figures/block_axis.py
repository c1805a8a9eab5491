"""The axis along which the blocks of a model lie, by stages where it has such."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from ...plan.figure import short_block

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GAP = 0.6  # blocks, between them and what lies in none
_BETWEEN = "#777777"


def places_of(blocks: Sequence[str]) -> list[float]:
    """Where each block lies: 0, 1, 2, ..., and what lies in none (`""`) a little apart."""
    places = [0.0] * len(blocks)
    for at, (before, block) in enumerate(pairwise(blocks), 1):
        places[at] = places[at - 1] + 1 + (_GAP if bool(before) != bool(block) else 0)
    return places


def mark_blocks(axes: Axes, blocks: Sequence[str], room: int) -> None:
    """Name the blocks along x; where they are of stages, the stages, with lines between them.

    Args:
        axes: the blocks lie where `places_of` has them.
        blocks: their names, `""` for what lies in none.
        room: how many names may stand in a row.
    """
    names, places = [short_block(block) for block in blocks], places_of(blocks)
    axes.set_xlim(places[0] - 0.5, places[-1] + 0.5)
    if any("." in name for name in names):
        stages = [
            list(group) for _, group in groupby(range(len(names)), lambda at: _stage(names[at]))
        ]
        middles = [(places[own[0]] + places[own[-1]]) / 2 for own in stages]
        axes.set_xticks(middles, [_stage(names[own[0]]) for own in stages])
        axes.tick_params(axis="x", length=0)
        for before, own in pairwise(stages):
            between = (places[before[-1]] + places[own[0]]) / 2
            axes.axvline(between, color=_BETWEEN, linewidth=0.6, zorder=1.5)
        axes.set_xlabel("stage (its blocks in order)")
        return
    numbers = [at for at, block in enumerate(blocks) if block]
    step = max(1, -(-len(numbers) // room))
    shown = sorted([*numbers[::step], *(at for at, block in enumerate(blocks) if not block)])
    axes.set_xticks([places[at] for at in shown], [names[at] for at in shown])
    axes.set_xlabel("block")


def _stage(name: str) -> str:
    return name.partition(".")[0]
