"""torch's own attention is measured in batches, against plain autograd on single samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import spt_kernels as spt

from .per_sample_truth import assert_exact

WIDTH, CONTEXT = 8, 6


class Attending(nn.Module):
    """Attention of tokens to each other, or to a context, in each form that torch has."""

    def __init__(
        self, context: int | None = None, *, tokens_first: bool = False, **options: bool
    ) -> None:
        super().__init__()
        self.tokens_first = tokens_first
        sizes = {} if context in (None, WIDTH) else {"kdim": context, "vdim": context}
        self.embed = nn.Linear(3, WIDTH)
        self.context = None if context is None else nn.Linear(3, context)
        self.attention = nn.MultiheadAttention(
            WIDTH, 2, batch_first=not tokens_first, **sizes, **options
        )
        self.top = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        query = self.embed(x)
        key = query if self.context is None else self.context(x).tanh()
        if self.tokens_first:
            query = key = query.transpose(0, 1)
        attended = self.attention(query, key, key, need_weights=False)[0]
        return self.top(attended.tanh().mean(0 if self.tokens_first else 1))


CASES = {
    "self": {},
    "self, tokens first": {"tokens_first": True},
    "context": {"context": WIDTH},
    "context of another width": {"context": CONTEXT},
    "without biases": {"bias": False},
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_exact_without_fallback(case: str) -> None:
    torch.manual_seed(0)
    model = Attending(**CASES[case])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    batches = [(torch.randn(n, 7, 3), torch.arange(n)) for n in (3, 1)]
    sensitivity = spt.measure_sensitivity(
        model, batches, num_samples=4, include=["attention.*"], progress=False
    )
    assert not sensitivity.fallback
    assert_exact(sensitivity, model, batches)
