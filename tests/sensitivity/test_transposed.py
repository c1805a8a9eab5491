"""Squared gradients of matrices that are kept as `[in, out]`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import spt_kernels as spt
from tests.sensitivity.per_sample_truth import assert_exact


class Transposed(nn.Module):
    """Two classes of five tokens, through a matrix `[in, out]` that is applied as `how` says."""

    def __init__(self, how: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(3, 2)
        self.weight, self.bias = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(3))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = self.how(self.bias, self.first(x).flatten(0, 1), self.weight)
        return self.last(x.unflatten(0, (-1, 5)).tanh().mean(1))


@pytest.mark.parametrize(
    ("how", "is_fast"),
    [
        (torch.addmm, True),
        (lambda b, x, w: torch.addmm(b, x, w) + torch.addmm(b, 2 * x, w), True),
        (lambda b, x, w: torch.addmm(input=b, mat1=x, mat2=w), False),
        (lambda b, x, w: torch.addmm(b, x, w, alpha=0.5), False),
    ],
    ids=["plain", "twice", "by name", "scaled"],
)
def test_a_product_with_a_transposed_matrix(
    how: Callable[[Tensor, Tensor, Tensor], Tensor], is_fast: bool
) -> None:
    batches = [(torch.randn(3, 5, 4), torch.tensor([0, 1, 1]))]
    model = Transposed(how)
    found = spt.measure_sensitivity(model, batches, include=["weight", "bias"], progress=False)
    assert set(found.fallback) == (set() if is_fast else {"weight", "bias"})
    assert_exact(found, model, batches)
