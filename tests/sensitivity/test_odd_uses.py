"""Parameters that a model looks at, views twice, or mixes with others: scores stay exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt

from .per_sample_truth import assert_exact

N_FEATURES = 6
Use = Callable[["Mixed", Tensor], Tensor]


class Mixed(nn.Module):
    """A layer, a norm and single parameters, used as `use` has it."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(N_FEATURES, N_FEATURES)
        self.norm = nn.LayerNorm(N_FEATURES)
        self.weight = nn.Parameter(torch.randn(N_FEATURES, N_FEATURES) / 2)
        self.scale = nn.Parameter(torch.tensor(0.8))
        self.gamma = nn.Parameter(torch.rand(N_FEATURES) + 0.5)
        self.head = nn.Linear(N_FEATURES, 5)
        self.use, self.seen = use, 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(self, self.norm(F.gelu(self.layer(x)))))


def batches_of(*sizes: int, shape: tuple[int, ...] = (N_FEATURES,)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(sum(sizes), *shape, generator=generator)
    labels = torch.randint(5, (sum(sizes),), generator=generator)
    return list(zip(inputs.split(sizes), labels.split(sizes), strict=True))


def check(model: nn.Module, batches: list[tuple[Tensor, Tensor]], **how: object) -> None:
    found = spt.measure_sensitivity(model, batches, progress=False, **how)  # type: ignore[arg-type]
    assert_exact(found, model, batches)


def note(model: Mixed, x: Tensor, value: float) -> Tensor:
    model.seen = value
    return x


LOOKED_AT: dict[str, Use] = {
    "norm of a matrix": lambda m, x: note(m, x, m.layer.weight.norm().item()),
    "largest as a float": lambda m, x: note(m, x, float(m.layer.weight.abs().max())),
    "guard by a norm's weight": lambda m, x: x if m.norm.weight.mean() > -1 else 0 * x,
    "guard by an entry": lambda m, x: x if m.layer.weight[0, 0] < 1e9 else 0 * x,
    "beside a matrix measured one by one": lambda m, x: note(
        m,
        torch.einsum("bi,oi->bo", x, m.weight),
        (m.layer.weight - F.normalize(m.weight)).norm().item(),
    ),
    "guard by a scale": lambda m, x: x * m.gamma if m.gamma.abs().sum() > 0 else x,
}


@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_model_that_looks_at_values(name: str) -> None:
    check(Mixed(LOOKED_AT[name]), batches_of(4, 3), include=["*"])


MIXED: dict[str, Use] = {
    "a scalar": lambda m, x: F.linear(x, F.normalize(m.weight) * m.scale),
    "a vector of rows": lambda m, x: F.linear(x, F.normalize(m.weight) * m.gamma[:, None]),
    "a vector of columns": lambda m, x: F.linear(x, F.normalize(m.weight) * m.gamma),
}


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("name", MIXED)
def test_what_is_made_with_a_matrix_that_is_used_plainly_too(name: str, size: int) -> None:
    """That matrix is measured one by one; in no batch may what it is made with be followed."""

    def use(model: Mixed, x: Tensor) -> Tensor:
        return MIXED[name](model, x) + torch.tanh(F.linear(x, model.weight))

    check(Mixed(use), batches_of(*[size] * (6 // size)), include=["*"])


VIEWED: dict[str, Callable[[Tensor], Tensor]] = {
    "unsqueeze twice": lambda g: g.unsqueeze(-1).unsqueeze(-1),
    "unsqueeze and view": lambda g: g.unsqueeze(-1).view(-1, 1, 1),
    "reshape twice": lambda g: g.reshape(-1, 1).reshape(-1, 1, 1),
    "cast and view": lambda g: g.double().float().view(-1, 1, 1),
}


@pytest.mark.parametrize("name", VIEWED)
def test_a_vector_that_is_viewed_more_than_once(name: str) -> None:
    """As the norms over channels of PoolFormer and VAN view their weight and bias."""

    class ChannelNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8) + 0.5)
            self.bias = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-3)
            return VIEWED[name](self.weight) * x + VIEWED[name](self.bias)

    torch.manual_seed(0)
    parts = nn.Conv2d(3, 8, 3), ChannelNorm(), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    check(nn.Sequential(*parts, nn.Linear(8, 5)), batches_of(4, 3, shape=(3, 6, 6)))


def test_a_learned_query_in_a_batch_of_one() -> None:
    class Pooler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 8)
            self.query = nn.Parameter(torch.randn(1, 2, 8))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.layer(x))
            query = self.query.expand(len(x), -1, -1)
            return self.head(self.attention(query, x, x, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    check(Pooler(), batches_of(4, 4, 1, shape=(4, 6)), include=["*in_proj*"])
