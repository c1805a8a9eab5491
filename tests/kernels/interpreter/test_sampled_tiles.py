"""The kernel of tiles on squares, interpreted, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.gradient_ways.tile_plan import TilePlan, _plan_squares
from spt_kernels.kernels import sampled_tiles
from spt_kernels.kernels.prepared_launch import PreparedLaunches
from spt_kernels.kernels.sampled_tiles import LAUNCHES, by_tiles

from .entries import (
    DTYPES,
    SHAPE_NAMES,
    SHAPES,
    check_entries,
    clustered,
    noise,
    poison_scratch,
    positions,
)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_scratch(monkeypatch)


def squares(index: torch.Tensor, n_out: int, n_in: int) -> TilePlan:
    return _plan_squares(index // n_in, index % n_in, n_out, n_in)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "n_out", "n_in", "nnz"), SHAPES, ids=SHAPE_NAMES)
def test_entries(tokens: int, n_out: int, n_in: int, nnz: int, dtype: torch.dtype) -> None:
    grad_output = noise(tokens, n_out, seed=0, dtype=dtype)
    x = noise(tokens, n_in, seed=1, dtype=dtype)
    index = positions(nnz, n_out * n_in)
    partial = by_tiles(grad_output, x, squares(index, n_out, n_in))
    check_entries(partial.sum(0), grad_output, x, index)


def test_split_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    short = {sizes: replace(launch, least_tokens=50) for sizes, launch in LAUNCHES.items()}
    monkeypatch.setattr(sampled_tiles, "LAUNCHES", short)
    grad_output = noise(270, 20, seed=0, dtype=torch.bfloat16)
    x = noise(270, 30, seed=1, dtype=torch.bfloat16)
    index = positions(50, 600)
    partial = by_tiles(grad_output, x, squares(index, 20, 30))
    assert len(partial) == 5
    check_entries(partial.sum(0), grad_output, x, index)


def test_views() -> None:
    grad_output = noise(20, 96, seed=0, dtype=torch.float32)[:, 32:64]
    x = noise(24, 20, seed=1, dtype=torch.float32).T
    index = positions(40, 32 * 24)
    partial = by_tiles(grad_output, x, squares(index, 32, 24))
    check_entries(partial.sum(0), grad_output, x, index)


def test_tiles_of_128_with_clustered_rows_and_columns() -> None:
    # rows and columns that occur are a fraction, in several tiles, with more entries than one sweep
    index = clustered(torch.arange(0, 900, 3), torch.arange(1, 1200, 4), 1200, 0.06)
    plan = squares(index, 900, 1200)
    assert plan.block == 128
    assert len(plan.rows) == 304  # 300, padded to a multiple of 16
    assert len(plan.columns) == 304
    grad_output = noise(6, 900, seed=0, dtype=torch.float32)
    x = noise(6, 1200, seed=1, dtype=torch.float32)
    check_entries(by_tiles(grad_output, x, plan).sum(0), grad_output, x, index)


def test_a_tile_by_parts_is_that_of_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    index = clustered(torch.arange(0, 900, 3), torch.arange(1, 1200, 4), 1200, 0.06)
    plan = squares(index, 900, 1200)
    grad_output = noise(40, 900, seed=0, dtype=torch.float32)
    x = noise(40, 1200, seed=1, dtype=torch.float32)
    whole = by_tiles(grad_output, x, plan)
    monkeypatch.setattr(sampled_tiles, "capability_of", lambda device: 90)
    monkeypatch.setattr(sampled_tiles, "_launches", PreparedLaunches())
    by_parts = by_tiles(grad_output, x, plan)
    (made,) = sampled_tiles._launches._made.values()
    assert made.constants[1:5] == (128, 128, 64, 64)
    assert len(by_parts) == len(whole) == 1
    torch.testing.assert_close(by_parts, whole)
