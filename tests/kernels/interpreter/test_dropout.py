"""The kernel of `dropout`, interpreted, against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels import dropout as kernels
from spt_kernels.reference import dropout as reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [0, 1, 63, 64, 1000])
@pytest.mark.parametrize("first", [0, 2**32 - 500])
def test_dropout(n: int, dtype: torch.dtype, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", 64)
    x = (1 + torch.rand(n, generator=torch.Generator().manual_seed(n))).to(dtype)
    found, expected = torch.full_like(x, float("nan")), torch.empty_like(x)
    key = (0xDEADBEEF, 0xF2345678, 0xB0000000, first)
    kernels.dropout(x, found, *key)
    reference.dropout(x, expected, *key)
    assert torch.equal(found, expected)
    found.fill_(float("nan"))
    kernels.dropout(x, found, 0, 0, *key[2:], torch.tensor(key[:2]))
    assert torch.equal(found, expected)
    kernels.dropout(x, x, *key)
    assert torch.equal(x, expected)
