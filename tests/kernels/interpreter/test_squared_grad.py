"""The kernels of `squared_grad`, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels import squared_grad as kernels

from ...tolerance import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def noise(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_matrix(score: Tensor, grad_output: Tensor, x: Tensor) -> None:
    gradients = torch.einsum("bto,bti->boi", grad_output.double(), x.double())
    truth = score.double() + (2.0 * gradients).square().sum(0)
    plain = score.clone()
    for sample_grad, sample_x in zip(grad_output, x, strict=True):
        plain += (2.0 * (sample_grad.T @ sample_x).float()).square()

    kernels.accumulate_squared_grad(score, grad_output, x, 2.0)

    assert_within_budget(score, plain, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 33, 65, 129), (3, 32, 64, 64)], ids=lambda s: "x".join(map(str, s))
)
def test_matrix(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    samples, tokens, n_out, n_in = shape
    score = noise(n_out, n_in, seed=2, dtype=torch.float32).square()
    grad_output = noise(samples, tokens, n_out, seed=0, dtype=dtype)
    check_matrix(score, grad_output, noise(samples, tokens, n_in, seed=1, dtype=dtype))


def use_tiles_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = kernels._Tile(16, 16, tokens=16, num_warps=1, num_stages=1, programs_per_sm=1)
    monkeypatch.setattr(kernels, "_LARGE", tile)
    monkeypatch.setattr(kernels, "_LARGE_FROM_TILES", 0)


def test_matrix_of_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # more row tiles than one group holds, and a last group that is not full
    use_tiles_of_16(monkeypatch)
    grad_output = noise(2, 5, 10 * 16 + 3, seed=0, dtype=torch.bfloat16)
    x = noise(2, 5, 2 * 16 + 1, seed=1, dtype=torch.bfloat16)
    check_matrix(torch.zeros(163, 33), grad_output, x)


@pytest.mark.parametrize(
    ("n_out", "n_in", "split"),
    [(48, 47, (8, 1, 5)), (30, 20, (0, 4, 2)), (64, 32, (8, 0, 1)), (33, 80, (15, 0, 1))],
    ids=["one over", "few", "as many as fit", "nearly as many"],
)
def test_the_last_tiles_are_shared_out_by_samples(
    n_out: int, n_in: int, split: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiles_of_16(monkeypatch)  # of which eight are at work at once
    assert kernels._Split.of(kernels._LARGE.count(n_out, n_in), 8, 5) == split
    grad_output = noise(5, 7, n_out, seed=0, dtype=torch.bfloat16)
    x = noise(5, 7, n_in, seed=1, dtype=torch.bfloat16)
    scores = [noise(n_in, n_out, seed=2, dtype=torch.float32).square().t() for _ in range(2)]
    for score in scores:
        check_matrix(score, grad_output, x)
    assert torch.equal(*scores)


def test_matrix_of_views() -> None:
    qkv = noise(2, 20, 96, seed=0, dtype=torch.float32)[:, :, 32:64]
    x = noise(2, 24, 20, seed=1, dtype=torch.float32).transpose(1, 2)
    whole = torch.ones(96, 24)
    check_matrix(whole[32:64], qkv, x)
    assert torch.equal(whole[:32], torch.ones(32, 24))
    assert torch.equal(whole[64:], torch.ones(32, 24))
    check_matrix(torch.ones(24, 32).T, qkv, x)


def test_nothing_to_add() -> None:
    score = torch.ones(4, 5)
    kernels.accumulate_squared_grad(score, torch.ones(2, 0, 4), torch.ones(2, 0, 5), 1.0)
    assert torch.equal(score, torch.ones(4, 5))
    kernels.accumulate_squared_grad(score[:0], torch.ones(2, 3, 0), torch.ones(2, 3, 5), 1.0)
