"""Squared gradients of tables that tokens look rows up in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt
from spt_kernels.sensitivity.per_sample.embedding import add_squared_lookups
from tests.tolerance import assert_within_budget

IDS = torch.tensor([[1, 2, 2, 0], [3, 3, 3, 1], [2, 0, 0, 0]])
LABELS = torch.tensor([0, 1, 1])


class Words(nn.Module):
    """Looks words up, once or twice, and tells two classes apart."""

    def __init__(self, *, twice: bool = False, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 6, **options)  # type: ignore[arg-type]
        self.mix, self.last = nn.Linear(6, 6), nn.Linear(6, 2)
        self.twice = twice

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        if self.twice:
            x = torch.cat([x, self.table(ids[:, :2]) * 2], 1)
        return self.last(self.mix(x).tanh().mean(1))


@pytest.mark.parametrize(
    ("options", "is_fast"),
    [
        ({}, True),
        ({"twice": True}, True),
        ({"padding_idx": -5}, True),
        ({"scale_grad_by_freq": True}, False),
    ],
    ids=["plain", "twice", "padding", "counting words"],
)
def test_each_row_is_squared_by_sample(options: dict[str, object], is_fast: bool) -> None:
    model = Words(**options)  # type: ignore[arg-type]
    found = spt.measure_sensitivity(
        model, [(IDS, LABELS)], include=["table.weight"], progress=False
    )
    truth = torch.zeros(5, 6, dtype=torch.float64)
    twin = Words(**options).double()  # type: ignore[arg-type]
    for i in range(3):
        loss = F.cross_entropy(twin(IDS[i : i + 1]), LABELS[i : i + 1])
        truth += torch.autograd.grad(loss, twin.table.weight)[0] ** 2
    torch.testing.assert_close(found["table.weight"].double(), truth, rtol=1e-5, atol=1e-12)
    assert found["table.weight"][4].eq(0).all()  # a word that nobody says
    assert found.fallback == (() if is_fast else ("table.weight",))


def test_a_table_that_the_forward_edits_is_measured_alone() -> None:
    found = spt.measure_sensitivity(
        Words(max_norm=100.0), [(IDS, LABELS)], include=["table.weight"], progress=False
    )
    assert found.fallback == ("table.weight",)


def test_sums_are_those_of_a_dense_gradient() -> None:
    torch.manual_seed(0)
    grad, rows = torch.randn(3, 50, 4), torch.randint(9, (3, 50))
    score, truth = torch.ones(9, 4), torch.ones(9, 4, dtype=torch.float64)
    add_squared_lookups(score, grad, rows, 0.5)
    plain = torch.ones(9, 4)
    for total in (truth, plain):
        one_hot = F.one_hot(rows, 9).to(total.dtype)
        total += (0.5 * torch.einsum("btr,btc->brc", one_hot, grad.to(total.dtype))).square().sum(0)
    assert_within_budget(score, plain, truth)
