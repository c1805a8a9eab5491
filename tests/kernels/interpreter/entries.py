"""Inputs of the sparse weight gradient's kernels, and their check against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ...tolerance import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# tokens, rows, columns, entries
SHAPES = [(1, 1, 1, 1), (9, 65, 129, 300), (33, 64, 64, 64 * 64), (65, 40, 200, 129)]
SHAPE_NAMES = ["one-element", "block-plus-one", "every-entry", "wide"]


def poison_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch and outputs start as NaN, so that an element nobody wrote is seen."""

    def poisoned(*shape: int, **how: object) -> Tensor:
        return torch.full(shape, float("nan"), **how)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "empty", poisoned)


def noise(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def positions(n: int, numel: int) -> Tensor:
    order = torch.randperm(numel, generator=torch.Generator().manual_seed(7))
    return order[:n].sort().values.int()


def check_entries(found: Tensor, grad_output: Tensor, x: Tensor, index: Tensor) -> None:
    truth = (grad_output.double().T @ x.double()).flatten()[index.long()]
    plain = (grad_output.T @ x).flatten()[index.long()]
    assert_within_budget(found, plain, truth)


def clustered(rows: Tensor, columns: Tensor, n_columns: int, share: float) -> Tensor:
    """Positions of a share of the entries of some rows and columns."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(len(rows), len(columns), generator=generator) < share
    return (rows[:, None] * n_columns + columns)[kept].int()
