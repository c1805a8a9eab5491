"""The kernel of tiles on strips, interpreted, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.gradient_ways import tile_plan
from spt_kernels.gradient_ways.tile_plan import TilePlan, plan_tiles
from spt_kernels.kernels import sampled_tiles
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
    # strips whatever squares would cost
    monkeypatch.setattr(tile_plan, "_STAGED_VALUES_PER_COPIED", -(10**6))


def strips(index: Tensor, n_out: int, n_in: int) -> TilePlan:
    plan = plan_tiles(index, n_out, n_in)
    assert plan.lists is not None
    assert plan.lists_rows == (n_out < n_in), "the narrower side is transposed"
    return plan


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("swapped", [False, True], ids=["lists-columns", "lists-rows"])
@pytest.mark.parametrize(("tokens", "n_in", "n_out", "nnz"), SHAPES, ids=SHAPE_NAMES)
def test_entries(
    tokens: int, n_out: int, n_in: int, nnz: int, dtype: torch.dtype, swapped: bool
) -> None:
    if swapped:
        n_out, n_in = n_in, n_out
    grad_output = noise(tokens, n_out, seed=0, dtype=dtype)
    x = noise(tokens, n_in, seed=1, dtype=dtype)
    index = positions(nnz, n_out * n_in)
    check_entries(
        by_tiles(grad_output, x, strips(index, n_out, n_in)).sum(0), grad_output, x, index
    )


@pytest.mark.parametrize(("dtype", "card"), [(torch.bfloat16, 80), (torch.float32, 90)], ids=str)
@pytest.mark.parametrize("width", tile_plan.STRIP_WIDTHS)
def test_groups_with_several_lists(
    width: int, dtype: torch.dtype, card: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_plan, "STRIP_WIDTHS", (width,))
    monkeypatch.setattr(sampled_tiles, "capability_of", lambda device: card)
    index = torch.arange(0, 320 * 191, 3, dtype=torch.int32)
    # a group without entries: groups and lists are numbered apart
    index = index[(index < 64 * 191) | (index >= 128 * 191)]
    plan = strips(index, 320, 191)
    assert len(plan.tiles) == 4 * -(-191 // width)
    assert plan.tiles[:, 0].unique().tolist() == [0, 2, 3, 4]
    grad_output = noise(70, 320, seed=0, dtype=dtype)
    x = noise(70, 191, seed=1, dtype=dtype)
    check_entries(by_tiles(grad_output, x, plan).sum(0), grad_output, x, index)


def test_split_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    short = {sizes: replace(launch, least_tokens=50) for sizes, launch in LAUNCHES.items()}
    monkeypatch.setattr(sampled_tiles, "LAUNCHES", short)
    grad_output = noise(270, 30, seed=0, dtype=torch.bfloat16)
    x = noise(270, 20, seed=1, dtype=torch.bfloat16)
    index = positions(50, 600)
    partial = by_tiles(grad_output, x, strips(index, 30, 20))
    assert len(partial) == 5
    check_entries(partial.sum(0), grad_output, x, index)


def test_views() -> None:
    grad_output = noise(20, 96, seed=0, dtype=torch.float32)[:, 32:64]
    x = noise(24, 20, seed=1, dtype=torch.float32).T
    index = positions(40, 32 * 24)
    check_entries(by_tiles(grad_output, x, strips(index, 32, 24)).sum(0), grad_output, x, index)


@pytest.mark.parametrize("shape", [(900, 400), (400, 900)], ids=["tall", "wide"])
def test_clustered(shape: tuple[int, int]) -> None:
    index = clustered(torch.arange(0, shape[0], 3), torch.arange(1, shape[1], 4), shape[1], 0.1)
    plan = strips(index, *shape)
    kept = plan.columns if plan.lists_rows else plan.rows
    assert 0 < len(kept) < max(shape) // 2, "what occurs of the other side is brought together"
    grad_output = noise(6, shape[0], seed=0, dtype=torch.float32)
    x = noise(6, shape[1], seed=1, dtype=torch.float32)
    check_entries(by_tiles(grad_output, x, plan).sum(0), grad_output, x, index)


def test_what_no_list_names_is_not_read() -> None:
    # NaN in every column and row without entries
    index = torch.tensor([3 * 50 + 7, 3 * 50 + 20, 99 * 50 + 7], dtype=torch.int32)
    x = torch.full((9, 50), float("nan"))
    x[:, [7, 20]] = 1.0
    grad_output = torch.full((9, 100), float("nan"))
    grad_output[:, [3, 99]] = 2.0
    found = by_tiles(grad_output, x, strips(index, 100, 50)).sum(0)
    assert found.tolist() == [18.0, 18.0, 18.0]
