"""Top-τ on CUDA: the candidates that a guess leaves, or else all scores, ranked by histograms."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .top_tau_filter import keep_candidates
from .top_tau_pieces import Candidates, Pieces
from .top_tau_rank import HEADER, INVALID, N_FOURS, PREFIX, REACHED, SHIFTS, rank, state_words
from .top_tau_selection import collect, count


@dataclass(frozen=True)
class _Ranked:
    """What the host is told of a selection: one copy from the device, for which it waits.

    Attributes:
        n_fours: candidates that there were, in fours.
        reached: what all scores that were looked at count for.
        n_invalid: scores that are none.
        threshold: the bits of the last selected score.
        above: scores of each tensor that are above it.
        tied: scores of each tensor that are equal to it.
    """

    n_fours: int
    reached: int
    n_invalid: int
    threshold: int
    above: list[int]
    tied: list[int]


def top_tau(tensors: Sequence[Tensor], k: int, caps: Sequence[int]) -> list[Tensor]:
    """See `spt_kernels.ops.top_tau.top_tau`; tensors are contiguous, on one device, not none.

    The host waits once, and once more where the guess does not hold. All positions lie in one
    buffer, of which the results are parts.
    """
    pieces = Pieces.of(tensors, caps)
    if pieces.n_groups == 0:
        return _nothing(tensors, k, 0)
    n_rows = len(tensors) if pieces.is_capped else 1

    state = _empty_state(pieces, n_rows)
    kept = keep_candidates(pieces, k, state)
    # what is not needed before is allocated once the device has something to do
    totals = torch.empty(pieces.n_groups, 2, dtype=torch.int64, device=pieces.device)
    found = _rank(pieces, state, totals, n_rows, k, kept)
    if kept is not None and (found.n_invalid or found.reached < k or found.n_fours > kept.capacity):
        kept, state = None, _empty_state(pieces, n_rows)
        found = _rank(pieces, state, totals, n_rows, k, kept)
    if found.n_invalid:
        raise ValueError("scores must be finite and not negative")
    if k == 0 or found.reached < k:
        return _nothing(tensors, k, found.reached)

    counted = sum(map(min, found.above, caps) if pieces.is_capped else found.above)
    ties = _share_ties(found.above, found.tied, caps, k - counted)
    n_ties = sum(ties)
    n_selected = sum(found.above) + n_ties
    output = torch.empty(n_selected, dtype=torch.int64, device=pieces.device)  # [selected]
    collect(pieces, state, totals, output, found.threshold, n_ties, kept)
    sizes = list(map(operator.add, found.above, ties))
    # what is unsafe about it concerns gradients, of which integers have none; it takes less
    return list(torch.unsafe_split_with_sizes(output, sizes))


def _nothing(tensors: Sequence[Tensor], k: int, reached: int) -> list[Tensor]:
    if k > reached:
        raise ValueError(f"k is {k}, but only {reached} positive scores can be counted")
    return [tensor.new_empty(0, dtype=torch.int64) for tensor in tensors]


def _empty_state(pieces: Pieces, n_rows: int) -> Tensor:
    n_words = state_words(len(pieces.numels), n_rows)
    return torch.zeros(n_words, dtype=torch.int64, device=pieces.device)


def _rank(
    pieces: Pieces,
    state: Tensor,
    totals: Tensor,
    n_rows: int,
    k: int,
    kept: Candidates | None,
) -> _Ranked:
    rank(pieces, state, n_rows, k, kept)
    count(pieces, state, totals, n_rows, k, kept)
    n_tensors, n_header = len(pieces.numels), HEADER.value
    words = state[: n_header + 2 * n_tensors].tolist()
    return _Ranked(
        n_fours=words[N_FOURS.value],
        reached=words[REACHED.value],
        n_invalid=words[INVALID.value],
        threshold=words[PREFIX.value + len(SHIFTS) - 1],
        above=words[n_header : n_header + n_tensors],
        tied=words[n_header + n_tensors :],
    )


def _share_ties(above: list[int], tied: list[int], caps: Sequence[int], missing: int) -> list[int]:
    """How many of its tied scores each tensor gives, the earlier first, to count for `missing`."""
    taken = [0] * len(tied)
    for m, n_tied in enumerate(tied):
        if n_tied and missing:
            counted = min(above[m] + n_tied, caps[m]) - min(above[m], caps[m])
            taken[m] = n_tied if counted < missing else missing
            missing -= min(counted, missing)
    return taken
