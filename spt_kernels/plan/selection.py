"""The prefixes of the ranking of all scores that budgets buy: the paper's selection (Eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..distributed import Processes
from ..ops.shared_top_tau import shared_top_tau
from ..ops.top_tau import top_tau


@dataclass(frozen=True)
class Segment:
    """One matrix (a row block) or vector of the ranking, and what it costs to train.

    Attributes:
        name: the parameter it belongs to.
        block: which of the parameter's row blocks it is.
        scores: view of its sensitivities, flat, contiguous; of a parameter whose scores are sharded
            those that are here.
        offset: flat position of its first element in the parameter.
        numel: how many elements it has.
        threshold: selected entries from which on it is no longer trained entry by entry.
        cost: parameters trained once the threshold is reached.
        structured: whether those are a LoRA's or an Adapter's; else they are all of its entries.
        first: flat position of the first of `scores` in it.
    """

    name: str
    block: int
    scores: Tensor
    offset: int
    numel: int
    threshold: int
    cost: int
    structured: bool
    first: int = 0


@dataclass(frozen=True)
class Selected:
    """What a budget buys.

    Attributes:
        positions: for each segment the selected flat positions, ascending; of a segment that
            reaches its threshold perhaps not all of them.
        counts: for each segment how many are selected in all.
    """

    positions: list[Tensor]
    counts: list[int]


def on_host(tensors: list[Tensor]) -> Sequence[Tensor]:
    """Vectors from the device in one copy, for which the host waits once."""
    sizes = [tensor.numel() for tensor in tensors]
    return torch.cat(tensors).cpu().split(sizes) if tensors else ()


def select(segments: Sequence[Segment], budgets: Sequence[int]) -> list[Selected]:
    """For each budget the shortest prefix whose `min(count, threshold)` sum to it.

    Under the paper's rule the threshold is the cost, so this spends a budget exactly. The prefix
    of a smaller budget lies within that of a larger one: only the largest reads all scores.
    """
    if not budgets:
        return []
    thresholds, names = [s.threshold for s in segments], _names(segments)
    most, *others = sorted(set(budgets), reverse=True)
    chosen = top_tau([s.scores for s in segments], most, thresholds, names=names)
    found = {most: _selected(chosen)}
    if others:  # what is left lies side by side: a call for all of it, not for each segment
        positions = torch.cat(chosen)
        values = _scores_of(segments, chosen)
    for budget in others:
        sizes = [p.numel() for p in chosen]
        within = top_tau(list(values.split(sizes)), budget, thresholds, names=names)
        kept = _side_by_side(within, sizes)
        positions, values = (part.index_select(0, kept) for part in (positions, values))
        chosen = list(positions.split([w.numel() for w in within]))
        found[budget] = _selected(chosen)
    return [found[budget] for budget in budgets]


def _selected(positions: list[Tensor]) -> Selected:
    return Selected(positions, [p.numel() for p in positions])


def _scores_of(segments: Sequence[Segment], positions: Sequence[Tensor]) -> Tensor:
    """Those at the positions in each segment, joined; an index in brackets takes a CPU longer."""
    pairs = zip(segments, positions, strict=True)
    return torch.cat([segment.scores.index_select(0, own) for segment, own in pairs])


def _side_by_side(within: list[Tensor], sizes: list[int]) -> Tensor:
    """Positions within each of some parts as positions in all of them, of these sizes, joined."""
    starts = list(accumulate(sizes, initial=0))[:-1]
    counts = [w.numel() for w in within]
    start, count = torch.tensor([starts, counts], device=within[0].device)
    joined = torch.cat(within)
    return joined.add_(torch.repeat_interleave(start, count, output_size=joined.numel()))


def select_shared(
    segments: Sequence[Segment], budgets: Sequence[int], group: Any
) -> list[Selected]:
    """`select` of scores that the processes of a group hold by rows; the same in each of them.

    What is selected is told to all: the scores stay where they are.
    """
    processes = Processes.of(group)
    thresholds = [s.threshold for s in segments]
    chosen = []
    for budget in budgets:
        own = shared_top_tau(
            [s.scores for s in segments], budget, thresholds, group=group, names=_names(segments)
        )
        placed = [(p + s.first).cpu() for p, s in zip(own, segments, strict=True)]
        # rows are dealt out in the order of ranks
        positions = [torch.cat(parts) for parts in zip(*processes.gather(placed), strict=True)]
        chosen.append(_selected(positions))
    return chosen


def select_by_cost(segments: Sequence[Segment], budgets: Sequence[int]) -> list[Selected]:
    """For each budget the shortest prefix that costs the most that fits into it.

    An entry costs 1 below its segment's threshold, the rest of the segment's cost at it, and
    nothing above it. So only the highest entries of each segment, up to its threshold, need to be
    walked, and where the threshold is out of reach, those among the `budget` highest of all.
    """
    if not budgets:
        return []
    candidates = _walkable(segments, max(budgets))
    device = candidates[0].device
    sizes = torch.tensor([p.numel() for p in candidates], device=device)
    values = _scores_of(segments, candidates)
    ranking = torch.argsort(values, descending=True, stable=True)  # [n], ties in model order
    owner = torch.repeat_interleave(sizes)[ranking]  # [n] the segment of each entry
    grouped = torch.argsort(owner, stable=True)
    nth = torch.empty_like(owner)  # [n] 1 for the highest entry of its segment
    start = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    nth[grouped] = torch.arange(1, owner.numel() + 1, device=device) - start
    threshold = torch.tensor([s.threshold for s in segments], device=device)[owner]
    cost = torch.tensor([s.cost for s in segments], device=device)[owner]
    total = torch.where(nth < threshold, 1, cost - nth + 1).cumsum(0)  # [n] of the prefix up to it

    ends = []
    for budget in budgets:
        if total.numel() == 0:
            raise overspent(budget, 0)
        length = int(torch.searchsorted(total, budget, right=True))
        if length == 0:
            raise ValueError(f"budget={budget} buys nothing: the first step costs {int(total[0])}")
        if length == total.numel() and int(total[-1]) < budget:
            raise overspent(budget, int(total[-1]))
        taken = torch.zeros_like(owner, dtype=torch.bool)
        taken[ranking[:length]] = True
        positions = [p[t] for p, t in zip(candidates, taken.split(sizes.tolist()), strict=True)]
        ends.append(_End(positions, int(owner[length - 1]), values[ranking[length - 1]]))
    return _counted(segments, ends)


class Overspent(ValueError):
    """A budget is more than there is to spend it on."""


def overspent(budget: int, most: int) -> Overspent:
    """The error for a budget that is more than all positive scores cost."""
    return Overspent(
        f"budget={budget:,} is more than can be spent: at most {most:,} parameters, those with a "
        "sensitivity above 0, each structured matrix at the cost of its module"
    )


def _walkable(segments: Sequence[Segment], budget: int) -> list[Tensor]:
    """Positions per segment of the entries that can change what a prefix within `budget` costs."""
    positives = torch.stack([(s.scores > 0).sum() for s in segments]).tolist()
    bounded = [s.threshold < s.scores.numel() for s in segments]
    free = [m for m, is_bounded in enumerate(bounded) if not is_bounded]
    most = min(budget, sum(positives[m] for m in free))
    chosen = dict(zip(free, _top([segments[m] for m in free], most), strict=True))
    for m, segment in enumerate(segments):
        if bounded[m]:
            [chosen[m]] = _top([segment], min(segment.threshold, positives[m]))
    return [chosen[m] for m in range(len(segments))]


@dataclass(frozen=True)
class _End:
    """A prefix: its positions up to the thresholds, and segment and score of its last entry."""

    positions: list[Tensor]
    segment: int
    score: Tensor


def _counted(segments: Sequence[Segment], ends: Sequence[_End]) -> list[Selected]:
    """How many entries of each segment are ranked no lower than the last one of each prefix."""
    counts = [[p.numel() for p in end.positions] for end in ends]
    for m, segment in enumerate(segments):
        # the segment of the last entry has just reached its threshold: it has no more
        full = [
            e
            for e, end in enumerate(ends)
            if counts[e][m] >= segment.threshold and end.segment != m
        ]
        if not full:
            continue
        lowest = torch.stack([ends[e].score for e in full]).min()
        high = segment.scores[segment.scores >= lowest].sort().values
        for e in full:
            # earlier segments win ties
            below = torch.searchsorted(high, ends[e].score, right=m > ends[e].segment)
            counts[e][m] = high.numel() - int(below)
    return [Selected(end.positions, own) for end, own in zip(ends, counts, strict=True)]


def _top(segments: Sequence[Segment], k: int) -> list[Tensor]:
    return top_tau([s.scores for s in segments], k, names=_names(segments))


def _names(segments: Sequence[Segment]) -> list[str]:
    return [f"sensitivity[{s.name!r}]" for s in segments]
