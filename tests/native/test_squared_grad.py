"""C++ squared gradients against one product per sample in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spt_kernels import native
from tests.tolerance import assert_within_budget

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(score: Tensor, grad_output: Tensor, x: Tensor, scale: float = 1.0) -> None:
    gradients = torch.einsum("bto,bti->boi", grad_output.double(), x.double())
    truth = score.double() + (scale * gradients).square().sum(0)
    # 16-bit numbers multiply exactly in fp32, so the fp32 product is what to compare with
    plain = score.clone()
    for sample_grad, sample_x in zip(grad_output.float(), x.float(), strict=True):
        plain += (scale * (sample_grad.T @ sample_x)).square()
    native.accumulate_squared_grad(score, grad_output, x, scale)
    assert_within_budget(score, plain, truth)


@DTYPES
@pytest.mark.parametrize(
    ("samples", "tokens", "n_out", "n_in"),
    [
        (1, 1, 1, 1),
        (3, 7, 9, 5),
        (2, 197, 97, 33),
        (5, 320, 12, 32),
        (2, 321, 13, 47),  # two blocks of tokens
        (2, 1000, 100, 40),  # four
        (3, 3, 200, 300),
    ],
    ids=lambda n: str(n),
)
def test_any_shape(
    any_code_path: str, samples: int, tokens: int, n_out: int, n_in: int, dtype: torch.dtype
) -> None:
    grad_output = noise(samples, tokens, n_out, seed=0, dtype=dtype)
    x = noise(samples, tokens, n_in, seed=1, dtype=dtype)
    check(noise(n_out, n_in, seed=2).square(), grad_output, x, scale=1.5)


def test_more_samples_and_columns_than_are_packed_at_a_time(any_code_path: str) -> None:
    check(torch.zeros(7, 40), noise(13, 3000, 7, seed=0), noise(13, 3000, 40, seed=1))
    check(torch.zeros(5, 700), noise(2, 4500, 5, seed=0), noise(2, 4500, 700, seed=1))


@DTYPES
def test_strides(any_code_path: str, dtype: torch.dtype) -> None:
    """A third of a fused qkv, tokens innermost, one row for all tokens, a slice of the score."""
    qkv = noise(3, 20, 96, seed=0, dtype=dtype)[:, :, 32:64]
    x = noise(3, 24, 20, seed=1, dtype=dtype).transpose(1, 2)
    score = torch.full((64, 40), 7.0)
    check(score[16:48, 8:32], qkv, x)
    kept = torch.ones(64, 40, dtype=torch.bool)
    kept[16:48, 8:32] = False
    assert (score[kept] == 7.0).all()
    check(torch.zeros(32, 24), qkv.expand(3, 20, 32), x[:, :1].expand_as(x))
    check(torch.zeros(16, 12), qkv[..., ::2], x[..., 1::2])


def test_nothing_to_add(any_code_path: str) -> None:
    for samples, tokens, n_out, n_in in [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)]:
        score = torch.full((n_out, n_in), 7.0)
        grad_output, x = torch.ones(samples, tokens, n_out), torch.ones(samples, tokens, n_in)
        native.accumulate_squared_grad(score, grad_output, x, 1.0)
        assert (score == 7.0).all()


def test_same_bits_for_any_number_of_threads(any_code_path: str, restored_threads: None) -> None:
    """Threads decide how many rows are a task, so any blocking gives the same bits as well."""
    for tokens in (150, 700):
        grad_output, x = noise(9, tokens, 205, seed=0), noise(9, tokens, 77, seed=1)
        scores = []
        for n_threads in (1, 2, 3, 7):
            torch.set_num_threads(n_threads)
            scores.append(torch.zeros(205, 77))
            native.accumulate_squared_grad(scores[-1], grad_output, x, 0.5)
        assert all(torch.equal(score, scores[0]) for score in scores[1:])


def test_a_sample_is_added_alike_alone_and_in_a_batch(any_code_path: str) -> None:
    grad_output, x = noise(6, 50, 30, seed=0), noise(6, 50, 45, seed=1)
    together, apart = torch.zeros(30, 45), torch.zeros(30, 45)
    native.accumulate_squared_grad(together, grad_output, x, 1.0)
    for b in range(6):
        native.accumulate_squared_grad(apart, grad_output[b : b + 1], x[b : b + 1], 1.0)
    assert torch.equal(together, apart)


def test_nan_reaches_only_the_entries_that_read_it(any_code_path: str) -> None:
    grad_output, x = noise(2, 50, 40, seed=0), noise(2, 50, 40, seed=1)
    grad_output[1, 20, 7] = float("nan")
    x[0, 3, 11] = float("inf")
    score = torch.zeros(40, 40)
    native.accumulate_squared_grad(score, grad_output, x, 1.0)
    bad = torch.zeros(40, 40, dtype=torch.bool)
    bad[7] = bad[:, 11] = True
    assert torch.equal(~score.isfinite(), bad)


def test_layout_and_dtype_are_checked() -> None:
    grad_output, x = noise(2, 3, 6, seed=0), noise(2, 3, 4, seed=1)
    score = torch.zeros(6, 4)
    accumulate = native.accumulate_squared_grad
    with pytest.raises(ValueError, match=r"score must be a CPU matrix of torch\.float32 with cont"):
        accumulate(score.double(), grad_output, x, 1.0)
    with pytest.raises(ValueError, match=r"score must be .* strides \(1, 6\)"):
        accumulate(torch.zeros(4, 6).T, grad_output, x, 1.0)
    with pytest.raises(ValueError, match=r"grad_output must be .* \[samples, tokens, 6\]"):
        accumulate(score, x, x, 1.0)
    with pytest.raises(ValueError, match=r"input must be .* got torch\.float64"):
        accumulate(score, grad_output, x.double(), 1.0)
    with pytest.raises(ValueError, match=r"input must have \(2, 3\) samples and tokens, got \(2,"):
        accumulate(score, grad_output, x[:, :2], 1.0)
