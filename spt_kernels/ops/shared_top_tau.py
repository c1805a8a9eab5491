"""Top-τ over scores of which each of several processes holds a part: they are never gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed import Processes
from .top_tau import top_tau, validate

_DIGIT_BITS = 8  # of a score that each exchange decides, from the highest on
_SHIFTS = range(32 - _DIGIT_BITS, -1, -_DIGIT_BITS)
_UNCAPPED = 2**62


def shared_top_tau(
    tensors: Sequence[Tensor],
    k: int,
    caps: Sequence[int] | None = None,
    *,
    group: Any,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """`top_tau` of the scores of all processes of a group, each of which gets its own positions.

    Every process gives its part of each tensor, which may be empty. What is selected in all of
    them is, to the last position, what `top_tau` selects of the parts of each tensor joined by
    rank: ties go to the earlier tensor, then to the lower rank, then to the lower position. So it
    is for tensors dealt out by rows, as by `fully_shard`, and for whole ones here and there.

    Positive fp32 scores are ordered as their bits are. The highest `k` of a process are all that
    can be among the highest of all, and of these the processes add up histograms, of 256 bins for
    each tensor and of eight bits of the scores at a time. That is `8 KiB` per tensor in all,
    however large it is.

    Args:
        tensors: this process's parts: as in `top_tau`, as many in every process.
        k: what the selection counts for in all processes, the same in each.
        caps: the most that each tensor counts for, all its parts together; the same in each.
        group: of `torch.distributed`, as `torch.distributed.group.WORLD`.
        names: what to call the tensors in messages, instead of their place in the list.

    Returns:
        For each tensor the selected flat positions in this process's part: int64 `[n]`, ascending.

    Raises:
        OtherProcessFailed: another process cannot take part; says why.
        ValueError: as `top_tau`, or what should be the same in each process is not.
        TypeError: as `top_tau`.
    """
    processes, tensors = Processes.of(group), list(tensors)
    if processes.size == 1:
        return top_tau(tensors, k, caps, names=names)
    candidates = processes.together(lambda: _candidates(tensors, k, caps, names))
    told = processes.gather((k, len(tensors), None if caps is None else list(caps)))
    for rank, own in enumerate(told):
        if own != told[0]:
            raise ValueError(
                f"k, tensors, caps: process {rank} has k, a number of tensors and caps of {own}, "
                f"process 0 of {told[0]}: expected the same in all of them"
            )
    if not tensors or k == 0:
        return candidates
    device = tensors[0].device
    # int64 [candidates], as wide as counts and unsigned
    scores = [t.detach().reshape(-1)[p].float() for t, p in zip(tensors, candidates, strict=True)]
    bits = torch.cat(scores).view(torch.int32).long()
    sizes = torch.tensor([p.numel() for p in candidates], device=device)
    owner = torch.repeat_interleave(torch.arange(len(tensors), device=device), sizes)
    limits = torch.tensor([_UNCAPPED] * len(tensors) if caps is None else list(caps), device=device)
    threshold, taken = _threshold(processes, bits, owner, limits, k)
    return _selected(candidates, list(bits.split(sizes.tolist())), threshold, taken)


def _candidates(
    tensors: list[Tensor], k: int, caps: Sequence[int] | None, names: Sequence[str] | None
) -> list[Tensor]:
    """Positions of the highest scores here that count for `k`, or of all that are positive."""
    validate(tensors, k, caps, names)
    counts = [(tensor > 0).sum() for tensor in tensors]
    positive = torch.stack(counts).tolist() if counts else []  # for which the host waits once
    limits = [_UNCAPPED] * len(tensors) if caps is None else caps
    reachable = sum(map(min, positive, limits))
    found = top_tau(tensors, min(k, reachable), caps, names=names)
    if reachable >= k:
        return found
    # of those beyond the caps some may be above what is selected last elsewhere
    return [torch.nonzero(tensor.reshape(-1) > 0).view(-1) for tensor in tensors]


def _threshold(
    processes: Processes, bits: Tensor, owner: Tensor, caps: Tensor, k: int
) -> tuple[int, list[int]]:
    """The bits of the last selected score, and how many of these bits each tensor gives here.

    Raises:
        ValueError: the positive scores of all processes do not reach `k`.
    """
    n_bins, n_tensors = 1 << _DIGIT_BITS, len(caps)
    above = torch.zeros_like(caps)  # [tensors] scores above the prefix, in all processes
    prefix = 0
    for shift in _SHIFTS:
        is_within = bits >> (shift + _DIGIT_BITS) == prefix
        cells = owner[is_within] * n_bins + (bits[is_within] >> shift) % n_bins
        own = torch.bincount(cells, minlength=n_tensors * n_bins).view(n_tensors, n_bins)
        counts = own.clone()
        processes.sum_([counts])
        down = above[:, None] + counts.flip(1).cumsum(1).flip(1)  # [tensors, bins] this bin and up
        reached = torch.minimum(down, caps[:, None]).sum(0)  # [bins]
        digit = int((reached >= k).sum()) - 1  # they fall from bin to bin
        if digit < 0:
            raise ValueError(
                f"k is {k}, but only {int(reached[0])} positive scores can be counted in "
                f"{n_tensors} tensors of {processes.size} processes"
            )
        above = down[:, digit] - counts[:, digit]
        prefix = prefix << _DIGIT_BITS | digit
    tied, own_tied = counts[:, digit], own[:, digit]
    return prefix, _own_ties(processes, _ties(above, tied, caps, k), own_tied)


def _ties(above: Tensor, tied: Tensor, caps: Tensor, k: int) -> Tensor:
    """How many of its tied scores each tensor gives, the earlier ones first, until `k` is met."""
    counted = torch.minimum(above + tied, caps) - torch.minimum(above, caps)
    missing = k - int(torch.minimum(above, caps).sum())
    left = missing - (counted.cumsum(0) - counted)  # [tensors] when its turn comes
    return torch.where(left <= 0, 0, torch.where(counted < left, tied, left))


def _own_ties(processes: Processes, taken: Tensor, tied: Tensor) -> list[int]:
    """How many of them are this process's, those of lower ranks being first."""
    before = torch.zeros_like(tied)
    for other in processes.gather(tied.tolist())[: processes.rank]:
        before += torch.tensor(other, device=tied.device)
    return (taken - before).clamp(min=0).minimum(tied).tolist()


def _selected(
    candidates: list[Tensor], bits: list[Tensor], threshold: int, taken: list[int]
) -> list[Tensor]:
    found = []
    for positions, own, ties in zip(candidates, bits, taken, strict=True):
        is_tied = own == threshold
        found.append(positions[(own > threshold) | (is_tied & (is_tied.cumsum(0) <= ties))])
    return found
