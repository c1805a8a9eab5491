"""The kernel of `squared_products`, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels import squared_products
from spt_kernels.kernels.squared_grad import accumulate_squared_grad

from .test_squared_grad import check_matrix, noise


@pytest.mark.parametrize("at_once", [1, 2, 5, 100])
def test_some_samples_at_a_time(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, tokens, n_out, n_in = 5, 7, 9, 300
    monkeypatch.setattr(squared_products, "_PRODUCT_BYTES", at_once * 4 * n_out * n_in)
    made = []
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **k: made.append(shape) or real(*shape, **k))
    grad_output = noise(samples, tokens, n_out, seed=0, dtype=torch.float32)
    x = noise(samples, tokens, n_in, seed=1, dtype=torch.float32)
    check_matrix(torch.ones(n_out, n_in), grad_output, x)
    assert made == [(min(at_once, samples), n_out, n_in)]


def test_a_product_beyond_the_bound_is_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squared_products, "_PRODUCT_BYTES", 1)
    check_matrix(torch.ones(4, 5), torch.ones(3, 2, 4), torch.ones(3, 2, 5))


def test_scores_in_columns() -> None:
    score = torch.zeros(6, 8).T
    accumulate_squared_grad(score, torch.ones(2, 3, 8), torch.ones(2, 3, 6), 1.0)
    assert torch.equal(score, torch.full((8, 6), 18.0))
