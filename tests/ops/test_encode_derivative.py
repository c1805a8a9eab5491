"""Codes of a derivative: the activation is exact, the error bounded, the levels the best."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.derivative_levels import derivative, expected_square, lloyd_max
from spt_kernels.ops.encode_derivative import (
    TWO_BITS,
    code_count,
    decode_derivative,
    encode_derivative,
    launch_decode,
    launch_encode,
)

from ..tolerance import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# what the model itself would call
PLAIN = {
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick-gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
SHAPES = [(), (1,), (0, 4), (3,), (5, 7), (2, 3, 65)]


def noise(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


def slopes(x: Tensor, function: str, bits: int) -> Tensor:
    """The derivative that the codes stand for, through the public ops, fp32."""
    _, codes = encode_derivative(x, function, bits)
    return decode_derivative(torch.ones_like(x, dtype=torch.float32), codes, function, bits)


def exact_slopes(x: Tensor, function: str) -> Tensor:
    return torch.from_numpy(derivative(function)(x.double().numpy()))


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", PLAIN)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_activation_is_the_plain_one_bit_for_bit(
    shape: tuple[int, ...], function: str, dtype: torch.dtype, bits: int
) -> None:
    x = noise(*shape, dtype=dtype)
    output, codes = encode_derivative(x, function, bits)
    assert torch.equal(output, PLAIN[function](x))
    assert codes.shape == (-(-x.numel() * bits // 8),)
    assert torch.equal(codes, encode_derivative(x, function, bits)[1])


@pytest.mark.parametrize("function", PLAIN)
def test_eight_bits_are_off_by_half_a_step_at_most_and_nothing_far_from_zero(function: str) -> None:
    x = torch.cat([torch.linspace(-9, 9, 100_001), torch.tensor([-3e38, -50.0, 50.0, 3e38])])
    found, exact = slopes(x, function, 8).double(), exact_slopes(x, function)
    exact[-4:] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert float((found - exact).abs().max()) <= 0.0025 + 1e-6
    assert found[-4:].tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("function", PLAIN)
def test_the_four_levels_are_those_of_the_least_expected_square(function: str) -> None:
    slope = derivative(function)
    assert lloyd_max(slope) == pytest.approx(TWO_BITS[function], abs=1e-9)
    least = expected_square(slope, *TWO_BITS[function])
    for which in range(3):  # and any other is worse
        for change in (-0.01, 0.01):
            other = list(TWO_BITS[function])
            other[which] += change
            assert expected_square(slope, *other) > least


@pytest.mark.parametrize("function", PLAIN)
def test_two_bits_take_the_nearest_level_and_err_by_nothing_on_average(function: str) -> None:
    _, a, b = TWO_BITS[function]
    levels = torch.tensor([1 - b, 1 - a, a, b], dtype=torch.float64)
    x = torch.linspace(-8, 8, 160_001)
    found, exact = slopes(x, function, 2).double(), exact_slopes(x, function)
    nearest = (exact[:, None] - levels).abs().min(1).values
    torch.testing.assert_close((found - exact).abs(), nearest, atol=2e-4, rtol=0)
    density = torch.exp(-x.double().square() / 2)
    for low, high in ((-8.0, 0.0), (0.0, 8.0)):  # of either half alone, too
        within = (x > low) & (x < high)
        error = ((found - exact) * density)[within].sum() / density[within].sum()
        assert abs(float(error)) < 1e-4


def test_regelu2_which_fits_the_function_is_further_from_the_derivative() -> None:
    # its published levels, which minimise ∫ (f - f̃)² over all x, in the terms of this file
    x = torch.linspace(-8, 8, 160_001)
    density = torch.exp(-x.double().square() / 2)
    theirs = torch.tensor([0.0, -0.0492, 1.0487, 1.0], dtype=torch.float64)
    theirs = theirs[(x > -3.186).long() + (x > -0.0012).long() + (x > 3.191).long()]
    exact = exact_slopes(x, "gelu")
    errors = [
        float(((found - exact).square() * density).sum() / density.sum()) ** 0.5
        for found in (slopes(x, "gelu", 2).double(), theirs)
    ]
    assert errors[0] == pytest.approx(0.0894, abs=1e-4)
    assert errors[1] == pytest.approx(0.241, abs=1e-3)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_multiplied_in_fp32_and_rounded_once(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int
) -> None:
    x, grad = noise(*shape, dtype=dtype), noise(*shape, dtype=dtype, scale=3.0).flip(-1 % 1)
    _, codes = encode_derivative(x, "gelu", bits)
    found = decode_derivative(grad, codes, "gelu", bits)
    assert found.dtype == dtype
    expected = grad.double() * slopes(x, "gelu", bits).double()
    assert_within_budget(found, expected.to(dtype), expected)


@pytest.mark.parametrize("bits", [2, 8])
def test_pieces_of_a_large_tensor_join(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad = noise(1003), noise(1003, scale=1.0)
    whole = encode_derivative(x, "gelu", bits)
    expected = decode_derivative(grad, whole[1], "gelu", bits)
    monkeypatch.setattr(sys.modules[code_count.__module__], "_PIECE", 64)
    pieces = encode_derivative(x, "gelu", bits)
    assert torch.equal(pieces[1], whole[1])
    assert torch.equal(decode_derivative(grad, pieces[1], "gelu", bits), expected)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("layout", ["transposed", "channels-last", "sliced", "expanded"])
def test_any_strides(layout: str, bits: int) -> None:
    x = noise(4, 6, 5, 3)
    view = {
        "transposed": x.transpose(0, 2),
        "channels-last": x.contiguous(memory_format=torch.channels_last),
        "sliced": x[:, 1:5, ::2],
        "expanded": x[:, :1].expand(4, 6, 5, 3),
    }[layout]
    output, codes = encode_derivative(view, "gelu", bits)
    assert torch.equal(output, F.gelu(view))
    found = decode_derivative(torch.ones_like(output), codes, "gelu", bits)
    assert torch.equal(found, slopes(view.contiguous(), "gelu", bits))


def test_nan_makes_a_gradient_of_nan() -> None:
    for bits in (2, 8):
        output, codes = encode_derivative(torch.tensor([float("nan"), 1.0]), "gelu", bits)
        assert output.isnan().tolist() == [True, False]
        grad = decode_derivative(output, codes, "gelu", bits)
        assert grad.isnan().tolist() == [True, False]


def test_opcheck() -> None:
    x = noise(3, 5, 4)
    for view, bits in ((x.transpose(0, 2), 2), (x[:, ::2], 2), (x[:0], 8)):
        torch.library.opcheck(torch.ops.spt.encode_derivative.default, (view, "gelu", bits))
        output, codes = encode_derivative(view, "gelu", bits)
        arguments = (output, codes, "gelu", bits)
        torch.library.opcheck(torch.ops.spt.decode_derivative.default, arguments)


def test_what_is_wrong_is_named() -> None:
    x = torch.zeros(6)
    _, codes = encode_derivative(x, "gelu", 2)
    with pytest.raises(TypeError, match=r"input: expected fp32, bf16 or fp16, got torch\.float64"):
        encode_derivative(x.double(), "gelu", 2)
    with pytest.raises(ValueError, match=r"function: expected one of gelu, .*, got 'relu'"):
        encode_derivative(x, "relu", 2)
    with pytest.raises(ValueError, match="bits: expected 2 or 8, got 4"):
        encode_derivative(x, "gelu", 4)
    with pytest.raises(TypeError, match=r"codes: expected uint8, got torch\.float32"):
        decode_derivative(x, x, "gelu", 2)
    with pytest.raises(ValueError, match=r"codes: expected shape \(6,\) on cpu, got \(2,\)"):
        decode_derivative(x, codes, "gelu", 8)
    with pytest.raises(ValueError, match="grad_output: expected no gaps, got strides"):
        decode_derivative(torch.zeros(12)[::2], codes, "gelu", 2)


def test_codes_of_a_large_tensor_are_counted_in_whole_bytes() -> None:
    assert [code_count(n, 2) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert code_count(5, 8) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("function", PLAIN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_card_gives_what_a_cpu_gives(dtype: torch.dtype, function: str, bits: int) -> None:
    x = noise(33, 129, dtype=dtype)
    output, codes = launch_encode(x.cuda(), function, bits)
    plain = PLAIN[function](x.cuda())
    assert_within_budget(output, plain, PLAIN[function](x.cuda().double()))
    grad = launch_decode(torch.ones_like(output), codes, function, bits).cpu()
    expected = slopes(x, function, bits)
    off = (grad.float() - expected).abs() > torch.finfo(dtype).eps * 2
    assert float(off.float().mean()) < 1e-3  # of 8 bits, where a rounding decides between two codes
