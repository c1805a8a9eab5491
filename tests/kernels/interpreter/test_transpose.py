"""The transposing kernel, interpreted: every value in its place, zeros behind."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels.transpose import transposed

from .entries import DTYPES, noise, poison_scratch


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_scratch(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (64, 64), (65, 129), (63, 7), (0, 5), (5, 0)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_every_value_in_its_place(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = noise(*shape, seed=0, dtype=dtype)
    found = transposed(matrix)
    assert found.shape == (shape[1], -(-shape[0] // 64) * 64)
    assert torch.equal(found[:, : shape[0]], matrix.T)
    assert torch.equal(found[:, shape[0] :], torch.zeros_like(found[:, shape[0] :]))


def test_views() -> None:
    matrix = noise(30, 90, seed=0, dtype=torch.float32)
    for view in (matrix[:, 20:50], matrix.T, matrix[::2, ::3]):
        assert torch.equal(transposed(view)[:, : len(view)], view.T)
