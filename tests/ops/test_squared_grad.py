"""`ops.squared_grad` against float64, one sample at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spt_kernels.ops.squared_grad import accumulate_squared_grad, accumulate_squared_vector_grad

from ..tolerance import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# samples, tokens, out, in
MATRIX_SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 4, 5),
    (3, 33, 65, 129),
    (4, 17, 130, 64),
    (2, 1, 96, 31),
]
ON_A_CARD = [(8, 197, 768, 768), (4, 197, 3072, 768)]


def shape_id(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def noise(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def matrix_truth(score: Tensor, grad_output: Tensor, x: Tensor, scale: float) -> Tensor:
    gradients = torch.einsum("bto,bti->boi", grad_output.double(), x.double())
    return score.double() + (scale * gradients).square().sum(0)


def matrix_plain(score: Tensor, grad_output: Tensor, x: Tensor, scale: float) -> Tensor:
    """What a batch-of-one loop of autograd gives: gradients in the dtype of the activations."""
    result = score.clone()
    for sample_grad, sample_x in zip(grad_output, x, strict=True):
        result += (scale * (sample_grad.T @ sample_x).float()).square()
    return result


def check_matrix(score: Tensor, grad_output: Tensor, x: Tensor, scale: float = 1.0) -> None:
    truth = matrix_truth(score, grad_output, x, scale)
    plain = matrix_plain(score, grad_output, x, scale)
    accumulate_squared_grad(score, grad_output, x, scale)
    assert_within_budget(score, plain, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "device"),
    [(shape, "cpu") for shape in MATRIX_SHAPES]
    + [pytest.param(shape, "cuda", marks=pytest.mark.gpu) for shape in MATRIX_SHAPES + ON_A_CARD],
    ids=lambda value: value if isinstance(value, str) else shape_id(value),
)
def test_matrix(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    samples, tokens, n_out, n_in = shape
    grad_output = noise(samples, tokens, n_out, seed=0, dtype=dtype, device=device)
    x = noise(samples, tokens, n_in, seed=1, dtype=dtype, device=device)
    score = noise(n_out, n_in, seed=2, dtype=torch.float32, device=device).square()
    check_matrix(score, grad_output, x, scale=1.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vector_with_and_without_input(dtype: torch.dtype, device: str) -> None:
    for samples, tokens, channels in [(1, 1, 1), (3, 5, 7), (4, 33, 65), (5, 64, 128)]:
        grad_output = noise(samples, tokens, channels, seed=0, dtype=dtype, device=device)
        x = noise(samples, tokens, channels, seed=1, dtype=dtype, device=device)
        for some_x in (x, None):
            score = torch.ones(channels, device=device)
            factor = torch.ones_like(x) if some_x is None else x
            gradients = (grad_output.double() * factor.double()).sum(1)
            plain = score + (2.5 * (grad_output * factor).sum(1).float()).square().sum(0)
            accumulate_squared_vector_grad(score, grad_output, some_x, 2.5)
            assert_within_budget(score, plain, 1 + (2.5 * gradients).square().sum(0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [None, 1, 3])
def test_weight_and_bias_of_a_norm(dtype: torch.dtype, device: str, rows: int | None) -> None:
    samples, tokens, channels = 4, 33, 65
    grad_output = noise(samples, tokens, channels, seed=0, dtype=dtype, device=device)
    x = 3 * noise(samples, tokens, channels, seed=1, dtype=dtype, device=device) + 1
    mean = x.float().mean(2)
    rstd = x.float().var(2, correction=0).rsqrt()
    shape = (channels,) if rows is None else (rows, channels)
    score, bias_score = torch.zeros(shape, device=device), torch.zeros(shape, device=device)

    accumulate_squared_vector_grad(score, grad_output, x, 2.5, mean, rstd, bias_score)

    normalized = (x.double() - mean[..., None]) * rstd[..., None]
    plain_normalized = (x.float() - mean[..., None]) * rstd[..., None]
    for found, factor, plain_factor in (
        (score, normalized, plain_normalized),
        (bias_score, torch.ones_like(normalized), torch.ones_like(plain_normalized)),
    ):
        truth = (2.5 * (grad_output.double() * factor).sum(1)).square()
        plain = (2.5 * (grad_output.float() * plain_factor).sum(1)).square()
        assert_within_budget(found.view(-1, channels).sum(0), plain.sum(0), truth.sum(0))
        if rows == 3:  # row 0 has samples 0 and 3
            assert_within_budget(found[0], plain[::3].sum(0), truth[::3].sum(0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": torch.ones(2, 3)}, "mean, rstd: expected both"),
        ({"mean": torch.ones(2, 4), "rstd": torch.ones(2, 3)}, "mean: expected shape"),
        ({"mean": torch.ones(2, 3), "rstd": torch.ones(2)}, "rstd: expected shape"),
        ({"mean": torch.ones(2, 3).double(), "rstd": torch.ones(2, 3)}, "mean: expected .*float32"),
        ({"bias_score": torch.ones(5)}, "bias_score: expected shape"),
        ({"bias_score": torch.ones(1, 4)}, "bias_score: expected 1 dimensions"),
        ({"score": torch.ones(4, 2).T}, "score: expected contiguous rows"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_statistics_and_biases_that_do_not_fit(given: dict[str, Tensor], message: str) -> None:
    x = torch.ones(2, 3, 4)
    arguments = {"score": torch.ones(4), "grad_output": x, "input": x} | given
    with pytest.raises((TypeError, ValueError), match=message):
        accumulate_squared_vector_grad(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_is_squared_by_itself(device: str) -> None:
    # two samples whose gradients cancel: a squared batch gradient would be zero
    grad_output = torch.tensor([[[1.0]], [[-1.0]]], device=device)
    ones = torch.ones_like(grad_output)
    score = torch.zeros(1, 1, device=device)
    accumulate_squared_grad(score, grad_output, ones)
    assert score.item() == 2.0
    vector = torch.zeros(1, device=device)
    accumulate_squared_vector_grad(vector, grad_output, None)
    accumulate_squared_vector_grad(vector, grad_output, ones)
    assert vector.item() == 4.0


@pytest.mark.parametrize("device", DEVICES)
def test_views_are_read_and_written_where_they_lie(device: str) -> None:
    # the middle third of a fused qkv, and an input whose tokens are innermost
    qkv = noise(3, 20, 96, seed=0, dtype=torch.float32, device=device)[:, :, 32:64]
    x = noise(3, 24, 20, seed=1, dtype=torch.float32, device=device).transpose(1, 2)
    whole = torch.ones(96, 24, device=device)
    truth = matrix_truth(whole[32:64], qkv, x, 1.0)

    accumulate_squared_grad(whole[32:64], qkv, x)

    torch.testing.assert_close(whole[32:64], truth.float())
    assert torch.equal(whole[:32], torch.ones(32, 24, device=device))
    assert torch.equal(whole[64:], torch.ones(32, 24, device=device))
    check_matrix(torch.ones(24, 32, device=device).T, qkv, x)
    check_matrix(torch.ones(32, 24, device=device), qkv.expand(3, 20, 32), x[:, :1].expand_as(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_nothing_to_add(shape: tuple[int, int, int, int], device: str) -> None:
    samples, tokens, n_out, n_in = shape
    grad_output = torch.ones(samples, tokens, n_out, device=device)
    score = torch.full((n_out, n_in), 7.0, device=device)
    accumulate_squared_grad(score, grad_output, torch.ones(samples, tokens, n_in, device=device))
    assert (score == 7.0).all()

    vector = torch.full((n_in,), 7.0, device=device)
    x = torch.ones(samples, tokens if n_out else 0, n_in, device=device)
    accumulate_squared_vector_grad(vector, x, x)
    accumulate_squared_vector_grad(vector, x, None)
    assert (vector == 7.0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_every_run(device: str) -> None:
    grad_output = noise(5, 40, 70, seed=0, dtype=torch.bfloat16, device=device)
    x = noise(5, 40, 130, seed=1, dtype=torch.bfloat16, device=device)
    scores = [torch.zeros(70, 130, device=device) for _ in range(3)]
    for score in scores:
        accumulate_squared_grad(score, grad_output, x)
    assert all(torch.equal(score, scores[0]) for score in scores)


@pytest.mark.parametrize("device", DEVICES)
def test_autograd_notices_the_mutation(device: str) -> None:
    for score, accumulate, x in (
        (torch.zeros(2, 3, device=device), accumulate_squared_grad, torch.ones(1, 1, 3)),
        (torch.zeros(2, device=device), accumulate_squared_vector_grad, None),
    ):
        before = score._version
        some_x = x if x is None else x.to(device)
        accumulate(score, torch.ones(1, 1, 2, device=device), some_x)  # type: ignore[operator]
        assert score._version > before


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    grad_output = noise(2, 6, 8, seed=0, dtype=torch.bfloat16, device=device)
    x = noise(2, 6, 8, seed=1, dtype=torch.bfloat16, device=device)
    matrix, vector = torch.zeros(8, 8, device=device), torch.zeros(8, device=device)
    ops = torch.ops.spt
    torch.library.opcheck(ops.accumulate_squared_grad.default, (matrix, grad_output, x, 2.0))
    torch.library.opcheck(
        ops.accumulate_squared_grad.default,
        (matrix[2:4].T, grad_output, x[:, :, ::4], 1.0),
    )
    for some_x in (x, None):
        torch.library.opcheck(
            ops.accumulate_squared_vector_grad.default, (vector, grad_output, some_x, 1.0)
        )


MATRIX = {
    "score": torch.zeros(4, 5),
    "grad_output": torch.zeros(2, 3, 4),
    "input": torch.zeros(2, 3, 5),
}
VECTOR = {
    "score": torch.zeros(4),
    "grad_output": torch.zeros(2, 3, 4),
    "input": torch.zeros(2, 3, 4),
}


@pytest.mark.parametrize(
    ("good", "change", "error", "message"),
    [
        (MATRIX, {"score": torch.zeros(4, 5).half()}, TypeError, "score: expected torch.float32"),
        (MATRIX, {"score": torch.zeros(4)}, ValueError, "score: expected 2 dimensions"),
        (MATRIX, {"score": torch.zeros(4, 5, requires_grad=True)}, ValueError, "no gradient"),
        (MATRIX, {"grad_output": torch.zeros(2, 3, 4).long()}, TypeError, "grad_output: expected"),
        (MATRIX, {"grad_output": torch.zeros(6, 4)}, ValueError, r"grad_output: .*\(6, 4\)"),
        (MATRIX, {"grad_output": torch.zeros(2, 3, 5)}, ValueError, r"shape \(2, 3, 4\)"),
        (MATRIX, {"input": torch.zeros(2, 3, 5).half()}, TypeError, "dtype of grad_output"),
        (MATRIX, {"input": torch.zeros(2, 2, 5)}, ValueError, r"input: .*\(2, 3, 5\)"),
        (MATRIX, {"input": torch.zeros(2, 3, 5, device="meta")}, ValueError, "expected device cpu"),
        (VECTOR, {"score": torch.zeros(4, 1, 1)}, ValueError, "score: expected 1 dimensions"),
        (VECTOR, {"score": torch.zeros(5)}, ValueError, r"grad_output: .*\(2, 3, 5\)"),
        (VECTOR, {"input": torch.zeros(2, 3, 1)}, ValueError, r"input: .*\(2, 3, 4\)"),
        (VECTOR, {"input": torch.zeros(2, 3, 4).int()}, TypeError, "input: expected fp32"),
    ],
)
def test_refuses(
    good: dict[str, Tensor], change: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    call = accumulate_squared_grad if good is MATRIX else accumulate_squared_vector_grad
    with pytest.raises(error, match=message):
        call(**(good | change))
