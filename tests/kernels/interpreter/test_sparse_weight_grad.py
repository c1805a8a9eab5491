"""The kernels of `sparse_weight_grad`, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels import sparse_weight_grad as kernels
from spt_kernels.kernels.tile_plan import plan_tiles

from ...tolerance import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch and outputs start as NaN, so that an element nobody wrote is seen."""
    monkeypatch.setattr(torch, "empty", lambda *a, **k: torch.full(a, float("nan"), **k))


def noise(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def positions(n: int, numel: int) -> Tensor:
    order = torch.randperm(numel, generator=torch.Generator().manual_seed(7))
    return order[:n].sort().values.int()


def check(grad_output: Tensor, x: Tensor, index: Tensor, *, tiled: bool) -> None:
    plan = plan_tiles(index, grad_output.shape[1], x.shape[1])
    call = kernels._by_tiles if tiled else kernels._by_vectors
    partial = call(grad_output, x, plan if tiled else index)  # type: ignore[operator]
    truth = (grad_output.double().T @ x.double()).flatten()[index.long()]
    plain = (grad_output.T @ x).flatten()[index.long()]
    assert_within_budget(partial.sum(0), plain, truth)


@pytest.mark.parametrize("tiled", [False, True], ids=["vectors", "tiles"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "n_out", "n_in", "nnz"),
    [(1, 1, 1, 1), (9, 65, 129, 300), (33, 64, 64, 64 * 64), (16, 40, 200, 129)],
    ids=["one-element", "block-plus-one", "every-entry", "wide"],
)
def test_entries(
    tokens: int, n_out: int, n_in: int, nnz: int, dtype: torch.dtype, tiled: bool
) -> None:
    grad_output = noise(tokens, n_out, seed=0, dtype=dtype)
    x = noise(tokens, n_in, seed=1, dtype=dtype)
    check(grad_output, x, positions(nnz, n_out * n_in), tiled=tiled)


@pytest.mark.parametrize("tiled", [False, True], ids=["vectors", "tiles"])
def test_split_tokens(tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_LEAST_TOKENS", 10)
    grad_output = noise(77, 20, seed=0, dtype=torch.bfloat16)
    x = noise(77, 30, seed=1, dtype=torch.bfloat16)
    splits, per_split = kernels._split(77, 1, 8)
    assert splits * per_split >= 77 > (splits - 1) * per_split
    assert splits == 5
    check(grad_output, x, positions(50, 600), tiled=tiled)


@pytest.mark.parametrize("tiled", [False, True], ids=["vectors", "tiles"])
def test_views(tiled: bool) -> None:
    grad_output = noise(20, 96, seed=0, dtype=torch.float32)[:, 32:64]
    x = noise(24, 20, seed=1, dtype=torch.float32).T
    check(grad_output, x, positions(40, 32 * 24), tiled=tiled)


def test_tiles_of_128_with_clustered_rows_and_columns() -> None:
    # rows and columns that occur are a fraction, in several tiles, with more entries than one sweep
    rows = torch.arange(0, 900, 3)
    columns = torch.arange(1, 1200, 4)
    kept = torch.rand(len(rows), len(columns), generator=torch.Generator().manual_seed(0)) < 0.06
    index = (rows[:, None] * 1200 + columns)[kept].int()
    plan = plan_tiles(index, 900, 1200)
    assert plan.block == 128
    assert len(plan.rows) == 304  # 300, padded to a multiple of 16
    assert len(plan.columns) == 304
    grad_output = noise(6, 900, seed=0, dtype=torch.float32)
    x = noise(6, 1200, seed=1, dtype=torch.float32)
    check(grad_output, x, index, tiled=True)


def test_the_cost_model_sends_the_very_sparse_to_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("_by_vectors", "_by_tiles"):
        monkeypatch.setattr(
            kernels, name, lambda *a, name=name: called.append(name) or torch.zeros(1, 1)
        )
    x = noise(4, 128, seed=0, dtype=torch.bfloat16)
    for nnz in (10, 2000):
        index = positions(nnz, 128 * 128)
        kernels.sparse_weight_grad(x, x, index, plan_tiles(index, 128, 128))
        kernels.sparse_weight_grad(x, x, index, None)
    assert called == ["_by_vectors", "_by_vectors", "_by_tiles", "_by_vectors"]


def test_nothing_wanted_or_nothing_to_sum() -> None:
    x = torch.ones(3, 4)
    empty = torch.zeros(0, dtype=torch.int32)
    assert kernels.sparse_weight_grad(x, x, empty, None).shape == (0,)
    index = torch.tensor([1, 5], dtype=torch.int32)
    assert torch.equal(kernels.sparse_weight_grad(x[:0], x[:0], index, None), torch.zeros(2))


def test_a_position_outside_is_not_read() -> None:
    x = torch.ones(3, 4)
    index = torch.tensor([-1, 3, 16], dtype=torch.int32)
    found = kernels.sparse_weight_grad(x, x, index, None)
    assert found.isnan().tolist() == [True, False, True]
    assert found[1] == 3.0
