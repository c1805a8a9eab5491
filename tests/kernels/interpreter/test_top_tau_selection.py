"""Counting what is selected, and writing it in order, interpreted."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels import top_tau_pieces
from spt_kernels.kernels.top_tau_pieces import Pieces
from spt_kernels.kernels.top_tau_rank import HEADER, PREFIX, rank, state_words
from spt_kernels.kernels.top_tau_selection import collect, count


def test_counts_of_groups_and_tensors_and_positions_up_to_so_many_ties(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(top_tau_pieces, "CUT", top_tau_pieces.Cut(16, 2, 4, 8))
    tensors = [torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in (200, 30)]
    tensors = [tensor.mul(6).floor() for tensor in tensors]
    flat = torch.cat(tensors)
    above, tied = flat > 4, flat == 4
    k = int(above.sum()) + 5
    pieces = Pieces.of(tensors, [2**62] * 2)
    state = torch.zeros(state_words(2, 1), dtype=torch.int64)
    totals = torch.full((pieces.n_groups, 2), -1)
    rank(pieces, state, 1, k, None)
    count(pieces, state, totals, 1, k, None)

    four = int(torch.tensor(4.0).view(torch.int32))
    assert int(state[PREFIX.value + 3]) == four
    groups = [*range(0, 200, 64), 200, 230]
    for group, (begin, end) in enumerate(pairwise(groups)):
        expected = [int(above[begin:end].sum()), int(tied[begin:end].sum())]
        assert totals[group].tolist() == expected
    of_tensors = [int(part.sum()) for kind in (above, tied) for part in kind.split([200, 30])]
    assert state[HEADER.value : HEADER.value + 4].tolist() == of_tensors

    for ties in (0, 5, of_tensors[2], of_tensors[2] + 1):
        output = torch.full((int(above.sum()) + ties,), -1)
        collect(pieces, state, totals, output, four, ties, None)
        chosen = above | (tied & (tied.cumsum(0) <= ties))
        positions = [part.nonzero().squeeze(1) for part in chosen.split([200, 30])]
        assert torch.equal(output, torch.cat(positions))
