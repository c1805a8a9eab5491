"""The kernels of `rebuild_input`, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels import rebuild_input as kernels

from ...tolerance import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN, so that an element nobody wrote is seen."""
    monkeypatch.setattr(torch, "empty", lambda *a, **k: torch.full(*a, float("nan"), **k))
    monkeypatch.setattr(torch, "empty_like", lambda x, **k: torch.full_like(x, float("nan"), **k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (16, 128), (17, 129), (2, 3, 24), (0, 4)], ids=lambda s: "x".join(map(str, s))
)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_layer_norm(shape: tuple[int, ...], dtype: torch.dtype, affine: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(shape, generator=generator) + 1).to(dtype)
    weight, bias = torch.randn(2, shape[-1], generator=generator).to(dtype)
    some_weight, some_bias = (weight, bias) if affine else (None, None)
    wide = x.float()
    rstd = ((wide - wide.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    mean = wide.mean(-1, keepdim=True)

    rebuilt = kernels.rebuild_layer_norm(x, mean, rstd, some_weight, some_bias, 1, dtype)

    wide_affine = (weight.double(), bias.double()) if affine else (None, None)
    truth = F.layer_norm(x.double(), shape[-1:], *wide_affine)
    plain = F.layer_norm(x, shape[-1:], some_weight, some_bias)
    assert_within_budget(rebuilt, plain, truth)


def test_layer_norm_of_two_dimensions_of_a_view() -> None:
    x = torch.randn(5, 4, 6, 9, generator=torch.Generator().manual_seed(0))[:, :, 1:4, ::2]
    weight, bias = torch.ones(3, 5), torch.zeros(3, 5)
    _, mean, rstd = torch.native_layer_norm(x, (3, 5), weight, bias, 1e-5)

    rebuilt = kernels.rebuild_layer_norm(x, mean, rstd, weight, bias, 2, torch.bfloat16)

    torch.testing.assert_close(rebuilt, F.layer_norm(x, (3, 5)).bfloat16())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # x / inf is the limit meant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("n", [0, 1, 2048, 2049])
def test_gelu(n: int, approximate: str, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(n, generator=torch.Generator().manual_seed(n))).to(dtype)

    rebuilt = kernels.rebuild_gelu(x, approximate, dtype)

    truth = F.gelu(x.double(), approximate=approximate)
    assert_within_budget(rebuilt, F.gelu(x, approximate=approximate), truth)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_gelu_of_any_strides(layout: str) -> None:
    x = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    view = x.transpose(0, 2) if layout == "transposed" else x[:, 1:5, ::2]

    rebuilt = kernels.rebuild_gelu(view, "none", torch.bfloat16)

    torch.testing.assert_close(rebuilt, F.gelu(view).bfloat16())
