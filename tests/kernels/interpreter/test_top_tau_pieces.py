"""How scores are cut, and read piece by piece, interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from spt_kernels.kernels import top_tau_pieces
from spt_kernels.kernels.top_tau_pieces import Pieces, group_of, read_runs, runs_of


@triton.jit
def copy_kernel(table_ptr, output_ptr, n_tensors, TILE: tl.constexpr, TILES: tl.constexpr):
    """Bits of all scores of a group, a tile after the other, each padded with zeros."""
    _, row_ptr, origin = group_of(table_ptr, n_tensors, TILE, TILES)
    at, length = runs_of(row_ptr, origin, None, 0, TILE, TILES)
    low = tl.zeros([], tl.uint32)
    slots = tl.arange(0, TILE)[None, :]
    bits = read_runs(row_ptr, origin, None, at, length, slots, low)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    tl.store(output_ptr + tile[:, None] * TILE + slots, bits.to(tl.int64))


def test_groups_hold_all_scores_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_tau_pieces, "CUT", top_tau_pieces.Cut(8, 2, 4, 8))
    tensors: list[Tensor] = [torch.rand(n) for n in (0, 70, 1, 0, 32)] + [torch.empty(0)]
    tensors[1][5] = -0.0
    tensors[4] = tensors[4].bfloat16()
    pieces = Pieces.of(tensors, [t.numel() for t in tensors])
    assert (pieces.numel, pieces.n_filters, pieces.n_groups) == (103, 5 + 1 + 2, 3 + 1 + 1)

    output = torch.full((pieces.n_groups, 32), -1)
    copy_kernel[(pieces.n_groups,)](pieces.table, output, len(tensors), TILE=8, TILES=4)

    padded = [torch.nn.functional.pad(t.float().abs(), (0, -len(t) % 32)) for t in tensors]
    assert torch.equal(output.flatten(), torch.cat(padded).view(torch.int32).long())
