"""The vector kernel of `sparse_weight_grad`, interpreted, and the choice among its ways."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.gradient_ways.gradient_cost import Way
from spt_kernels.gradient_ways.tile_plan import plan_tiles
from spt_kernels.kernels import sparse_weight_grad as kernels

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


@pytest.mark.parametrize("way", ["vectors", "dense", "dense-in-blocks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "n_out", "n_in", "nnz"), SHAPES, ids=SHAPE_NAMES)
def test_entries(
    tokens: int, n_out: int, n_in: int, nnz: int, dtype: torch.dtype, way: str
) -> None:
    grad_output = noise(tokens, n_out, seed=0, dtype=dtype)
    x = noise(tokens, n_in, seed=1, dtype=dtype)
    index = positions(nnz, n_out * n_in)
    if way == "vectors":
        found = kernels.by_vectors(grad_output, x, index).sum(0)
    else:
        by = kernels.by_dense if way == "dense" else kernels.by_dense_blocks
        found = by(grad_output, x, index)
    check_entries(found, grad_output, x, index)


def test_split_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LAUNCH", replace(kernels.LAUNCH, least_tokens=10))
    grad_output = noise(77, 20, seed=0, dtype=torch.bfloat16)
    x = noise(77, 30, seed=1, dtype=torch.bfloat16)
    index = positions(50, 600)
    partial = kernels.by_vectors(grad_output, x, index)
    assert len(partial) == 7, "77 tokens in splits of 12"
    check_entries(partial.sum(0), grad_output, x, index)


def test_views() -> None:
    grad_output = noise(20, 96, seed=0, dtype=torch.float32)[:, 32:64]
    x = noise(24, 20, seed=1, dtype=torch.float32).T
    index = positions(40, 32 * 24)
    check_entries(kernels.by_vectors(grad_output, x, index).sum(0), grad_output, x, index)
    found = kernels.by_dense_blocks(grad_output, x, index)
    check_entries(found, grad_output, x, index)


def test_dense_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_DENSE_BLOCK_NUMEL", 7 * 300)
    index = clustered(torch.arange(0, 90, 3), torch.arange(0, 600, 9), 600, 0.2)
    grad_output = noise(6, 90, seed=0, dtype=torch.bfloat16)
    x = noise(6, 600, seed=1, dtype=torch.bfloat16)
    check_entries(kernels.by_dense_blocks(grad_output, x, index), grad_output, x, index)


@pytest.mark.parametrize("way", list(Way), ids=lambda way: way.value)
def test_every_way_gives_the_same(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "cheapest_way", lambda *a, **k: way)
    for n_out, n_in, nnz in ((160, 130, 200), (130, 160, 200), (130, 160, 2_000)):
        index = positions(nnz, n_out * n_in)
        grad_output = noise(70, n_out, seed=0, dtype=torch.float16)
        x = noise(70, n_in, seed=1, dtype=torch.float16)
        plan = plan_tiles(index, n_out, n_in)
        found = kernels.sparse_weight_grad(grad_output, x, index, plan)
        check_entries(found, grad_output, x, index)
        again = kernels.sparse_weight_grad(grad_output, x, index, plan)
        assert torch.equal(found, again), "the same bits on every run"


def test_a_way_is_chosen_once_for_a_plan_and_what_else_it_hangs_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []

    def choose(*_: object, is_fp32: bool, allows_tf32: bool) -> Way:
        asked.append(allows_tf32)
        return Way.DENSE if allows_tf32 else Way.VECTORS

    monkeypatch.setattr(kernels, "cheapest_way", choose)
    index, x = positions(200, 160 * 130), torch.ones(3, 130)
    plan, grad_output = plan_tiles(index, 160, 130), torch.ones(3, 160)
    taken: list[str] = []
    for way in ("by_vectors", "by_dense"):
        original = getattr(kernels, way)

        def noted(*args: object, way: str = way, original: object = original) -> object:
            taken.append(way)
            return original(*args)

        monkeypatch.setattr(kernels, way, noted)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "ieee", "tf32", "ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            kernels.sparse_weight_grad(grad_output, x, index, plan)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert asked == [False, True]
    assert taken == ["by_vectors", "by_vectors", "by_dense", "by_vectors", "by_dense"]
    kernels.sparse_weight_grad(grad_output, x, index, plan_tiles(index, 160, 130))
    assert len(asked) == 3


def test_nothing_wanted_or_nothing_to_sum() -> None:
    x = torch.ones(3, 4)
    empty = torch.zeros(0, dtype=torch.int32)
    assert kernels.sparse_weight_grad(x, x, empty, None).shape == (0,)
    index = torch.tensor([1, 5], dtype=torch.int32)
    assert torch.equal(kernels.sparse_weight_grad(x[:0], x[:0], index, None), torch.zeros(2))


@pytest.mark.parametrize("way", [Way.VECTORS, Way.DENSE], ids=lambda way: way.value)
def test_a_position_outside_is_not_read(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "cheapest_way", lambda *a, **k: way)
    x = torch.ones(3, 4)
    index = torch.tensor([-1, 3, 16], dtype=torch.int32)
    found = kernels.sparse_weight_grad(x, x, index, None)
    assert found.isnan().tolist() == [True, False, True]
    assert found[1] == 3.0


def test_inputs_that_are_not_finite_stay_with_their_entries() -> None:
    grad_output, x = torch.ones(9, 40), torch.ones(9, 50)
    x[4, 7] = float("nan")
    grad_output[2, 3] = float("inf")
    index = torch.tensor([7, 8, 3 * 50 + 9, 3 * 50 + 7], dtype=torch.int32)
    found = kernels.by_vectors(grad_output, x, index).sum(0)
    assert found.isnan().tolist() == [True, False, False, True]
    assert found[1:3].tolist() == [9.0, float("inf")]
