"""The kernels of `encode_derivative`, interpreted, against the reference and float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels import encode_derivative as kernels
from spt_kernels.ops.encode_derivative import STEPS, TWO_BITS, ZERO, four_levels, levels_of
from spt_kernels.reference import encode_derivative as reference

from ...tolerance import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 3, 64, 66, 200]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", 64)


def noise(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (2 * torch.randn(n, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("function", reference.FUNCTIONS)
@pytest.mark.parametrize("n", SIZES)
def test_encode(n: int, function: str, bits: int, dtype: torch.dtype) -> None:
    x = noise(n, dtype)
    output = torch.full_like(x, float("nan"))
    codes = torch.full(((n * bits + 7) // 8,), 0xA5, dtype=torch.uint8)
    how = function, bits, TWO_BITS[function][0], STEPS, ZERO

    kernels.encode(x, output, codes, *how)

    plain = reference.FUNCTIONS[function]
    assert_within_budget(output, plain(x), plain(x.double()))
    expected = reference.encode(x, *how)
    if bits == 2:
        assert torch.equal(codes, expected)
    else:  # where a rounding decides between two codes, either is as near
        off = (codes.int() - expected.int()).abs()
        assert int((off > 1).sum()) == 0
        assert int((off > 0).sum()) <= 0.01 * n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("n", SIZES)
def test_decode(n: int, bits: int, dtype: torch.dtype) -> None:
    grad = noise(n, dtype, seed=1)
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(256, ((n * bits + 7) // 8,), dtype=torch.uint8, generator=generator)
    found = torch.full_like(grad, float("nan"))

    kernels.decode(grad, codes, found, bits, four_levels("gelu"), STEPS, ZERO)

    levels = levels_of("gelu", bits)
    expected = reference.decode(grad, codes, levels)
    if dtype != torch.bfloat16:  # to which the interpreter rounds in its own way
        assert torch.equal(found, expected)
    assert_within_budget(found, expected, reference.decode(grad.double(), codes, levels).double())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # x / inf is the limit meant
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # of what is not read
def test_far_from_zero_and_nan() -> None:
    x = torch.tensor([-3e38, -50.0, 50.0, 3e38, float("nan")])
    for function in reference.FUNCTIONS:
        output, codes = torch.empty_like(x), torch.empty(5, dtype=torch.uint8)
        kernels.encode(x, output, codes, function, 8, 0.5, STEPS, ZERO)
        assert codes[:4].tolist() == [ZERO, ZERO, ZERO + STEPS, ZERO + STEPS]
        assert output.isnan().tolist() == [False] * 4 + [True]
