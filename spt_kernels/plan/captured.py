"""How much sensitivity a selection captures, in numbers that plans can be weighed by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed import Processes
from .selection import Segment, Selected, on_host


def captured(segments: Sequence[Segment], selected: Selected, group: Any) -> float:
    """The sum of the scores that a selection pays for, the same in every process.

    Every parameter of a budget counts for one score: a matrix whose module costs σ for its σ
    highest, however many are selected in it. Under the paper's rule no other selection of the same
    cost has more.

    Args:
        segments: what was ranked.
        selected: of them.
        group: the processes that hold the scores by rows; None where each has all.
    """
    own = []
    for segment, positions, count in zip(
        segments, selected.positions, selected.counts, strict=True
    ):
        scores = segment.scores
        if count < segment.threshold or positions.numel() >= segment.cost:
            here = positions.to(scores.device)
            if scores.numel() < segment.numel:  # others are elsewhere; to look makes the host wait
                here = here - segment.first
                here = here[(here >= 0) & (here < scores.numel())]
            scores = scores.index_select(0, here)
        # else it is trained whole, or by a module that costs more than is known to be selected
        own.append(_highest(scores, segment.cost))
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    # a part of one copy would be sent with all of it
    parts_of_all = Processes.of(group).gather([scores.clone() for scores in on_host(own)])
    for segment, *parts in zip(segments, *parts_of_all, strict=True):
        total += _highest(torch.cat(parts), segment.cost).sum(dtype=torch.float64)
    return float(total)


def _highest(scores: Tensor, most: int) -> Tensor:
    return scores if scores.numel() <= most else scores.topk(most).values
