"""The last selected score from histograms of its digits, interpreted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels import top_tau_pieces
from spt_kernels.kernels.top_tau_pieces import Pieces
from spt_kernels.kernels.top_tau_rank import BINS, HEADER, PREFIX, rank, state_words


@pytest.mark.parametrize("n_rows", [1, 2], ids=["together", "by-tensor"])
def test_histograms_of_the_digits_of_what_may_be_last(
    n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top_tau_pieces, "CUT", top_tau_pieces.Cut(32, 2, 4, 16))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.rand(n, generator=generator).mul(9).floor() for n in (300, 40)]
    tensors[1][3] = 1e-40
    k = 100
    pieces = Pieces.of(tensors, [2**62] * 2)
    state = torch.zeros(state_words(2, n_rows), dtype=torch.int64)
    rank(pieces, state, n_rows, k, None)

    bits = [t.view(torch.int32) for t in tensors]
    bits = [torch.cat(bits)] if n_rows == 1 else bits
    last = int(torch.cat(tensors).sort(descending=True).values[k - 1].view(torch.int32))
    levels = state[HEADER.value + 4 :].view(4, n_rows * (BINS.value + 1))
    for level, (above, shift) in enumerate([(31, 23), (23, 15), (15, 7), (7, 0)]):
        for row, own in enumerate(bits):
            within = own[(own != 0) & (own >> above == last >> above)]
            digits = (within >> shift) & ((1 << (above - shift)) - 1)
            counts = levels[level, row * BINS.value :][: BINS.value]
            assert torch.equal(counts, torch.bincount(digits, minlength=BINS.value))
            n_above = int((own >> above > last >> above).sum())
            assert int(levels[level, n_rows * BINS.value + row]) == n_above
    prefixes = state[PREFIX.value : PREFIX.value + 3].tolist()
    assert prefixes == [last >> 23, last >> 15, last >> 7]
