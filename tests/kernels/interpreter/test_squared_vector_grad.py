"""The kernel of `squared_vector_grad`, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels.squared_vector_grad import accumulate_squared_vector_grad

from ...tolerance import assert_within_budget
from .test_squared_grad import DTYPES, noise

SHAPES = [(1, 1, 1), (3, 33, 65), (5, 32, 64)]


def squares(gradients: Tensor) -> Tensor:
    return (2.0 * gradients).square().sum(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [None, 1, 2])
@pytest.mark.parametrize("has_bias", [False, True], ids=["alone", "with bias"])
@pytest.mark.parametrize("factor", ["ones", "input", "normalized"])
def test_vector(factor: str, has_bias: bool, rows: int | None, dtype: torch.dtype) -> None:
    for samples, tokens, channels in SHAPES:
        grad_output = noise(samples, tokens, channels, seed=0, dtype=dtype)
        x = None if factor == "ones" else noise(samples, tokens, channels, seed=1, dtype=dtype)
        statistics: tuple[Tensor | None, ...] = (None, None)
        multiplied = torch.ones_like(grad_output) if x is None else x
        if factor == "normalized":
            mean, rstd = (noise(samples, tokens, seed=s, dtype=torch.float32) for s in (2, 3))
            multiplied = (x.double() - mean[..., None]) * rstd[..., None]
            statistics = mean, rstd
        shape = (channels,) if rows is None else (rows, channels)
        score = torch.full(shape, 1.0 / (rows or 1))
        bias_score = score.clone() if has_bias else None

        accumulate_squared_vector_grad(score, grad_output, x, 2.0, *statistics, bias_score)

        plain = 1 + squares((grad_output.float() * multiplied.float()).sum(1))
        truth = 1 + squares((grad_output.double() * multiplied.double()).sum(1))
        assert_within_budget(score.view(-1, channels).sum(0), plain, truth)
        if bias_score is not None:
            plain = 1 + squares(grad_output.float().sum(1))
            truth = 1 + squares(grad_output.double().sum(1))
            assert_within_budget(bias_score.view(-1, channels).sum(0), plain, truth)


def test_each_sample_goes_to_its_row() -> None:
    grad_output = torch.arange(1.0, 6.0).view(5, 1, 1)
    score = torch.zeros(2, 1)
    accumulate_squared_vector_grad(score, grad_output, None, 1.0)
    assert score.flatten().tolist() == [1 + 9 + 25, 4 + 16]


def test_views_of_channels_first() -> None:
    grad_output = noise(2, 70, 40, seed=0, dtype=torch.float32).transpose(1, 2)
    x = noise(2, 90, 40, seed=1, dtype=torch.float32)[:, 10:80].transpose(1, 2)
    score = torch.zeros(70)
    accumulate_squared_vector_grad(score, grad_output, x, 2.0)
    torch.testing.assert_close(score, squares((grad_output * x).sum(1)))


def test_nothing_to_add() -> None:
    score = torch.ones(4)
    accumulate_squared_vector_grad(score, torch.ones(0, 3, 4), None, 1.0)
    assert torch.equal(score, torch.ones(4))
