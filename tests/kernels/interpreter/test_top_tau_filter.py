"""The guess of what can be selected, and the filter, interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels import top_tau_filter, top_tau_pieces
from spt_kernels.kernels.top_tau_pieces import Candidates, Pieces
from spt_kernels.kernels.top_tau_rank import HEADER, LOW, N_FOURS


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_tau_pieces, "CUT", top_tau_pieces.Cut(64, 2, 4, 16))
    monkeypatch.setattr(top_tau_filter, "_SAMPLES", 1024)
    monkeypatch.setattr(top_tau_filter, "_DRAW_BLOCK", 1024)


def kept_of(tensors: list[Tensor], k: int, caps: list[int]) -> tuple[Candidates, int, int]:
    """Candidates, the bits from which on they are, and how many fours of them were found."""
    pieces, state = Pieces.of(tensors, caps), torch.zeros(HEADER.value, dtype=torch.int64)
    kept = top_tau_filter.keep_candidates(pieces, k, state)
    assert kept is not None
    return kept, int(state[LOW.value]), int(state[N_FOURS.value])


def test_every_four_from_the_guess_on_is_kept_in_the_order_of_its_tile() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(n, generator=generator) for n in (700, 3, 130)]
    kept, low, n_fours = kept_of(scores, 40, [2**62] * 3)
    assert low > 1
    found = 0
    for tensor, first_group in zip(scores, (0, 3, 4), strict=True):
        for tile, part in enumerate(tensor.split(64)):
            run = int(kept.runs[first_group * 4 + tile])
            at, n = run >> 16, run & 0xFFFF
            fours = torch.nn.functional.pad(part, (0, -len(part) % 4)).view(torch.int32).view(-1, 4)
            own = fours.amax(1) >= low
            assert torch.equal(kept.places[at : at + n], own.nonzero().squeeze(1).int())
            assert torch.equal(kept.fours[at : at + n], fours[own])
            found += n
    assert found == n_fours <= kept.capacity


@pytest.mark.parametrize("pattern", ["random", "columns", "ascending"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_guess_is_low_but_not_by_much(
    pattern: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top_tau_pieces, "CUT", top_tau_pieces.Cut(2048, 2, 4, 16))
    scores = torch.rand(40, 1024, generator=torch.Generator().manual_seed(1))
    if pattern == "columns":  # of which a fixed step would see none or only those
        scores[:, ::32] += 1
    elif pattern == "ascending":
        scores = scores.flatten().sort().values
    tensor = scores.to(dtype).flatten()
    _, low, _ = kept_of([tensor], 1000, [2**62])
    n = int((tensor.float().view(torch.int32) >= low).sum())
    assert 1000 <= n <= 4000


def test_what_a_tensor_counts_for_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_tau_pieces, "CUT", top_tau_pieces.Cut(2048, 2, 4, 16))
    generator = torch.Generator().manual_seed(2)
    high, low_ones = (
        1 + torch.rand(4000, generator=generator),
        torch.rand(4000, generator=generator),
    )
    _, of_both, _ = kept_of([high, low_ones], 600, [2**62] * 2)
    _, with_cap, _ = kept_of([high, low_ones], 600, [100, 4000])
    assert of_both > int(torch.tensor(1.0).view(torch.int32)) > with_cap
    assert int((low_ones.view(torch.int32) >= with_cap).sum()) >= 500


def test_a_sample_holds_no_more_tensors_than_it_has_rows() -> None:
    pieces = Pieces.of([torch.ones(4)] * 1025, [4] * 1025)
    assert top_tau_filter.keep_candidates(pieces, 1, torch.zeros(8).long()) is None
