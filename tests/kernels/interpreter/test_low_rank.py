"""The kernels of a low-rank update, interpreted, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels import low_rank as kernels
from spt_kernels.kernels.low_rank_parts import MOST_COLUMNS, Dropped
from spt_kernels.ops import low_rank_ways
from spt_kernels.reference import low_rank as reference
from tests.tolerance import assert_within_budget

DTYPES = list(MOST_COLUMNS)
WORDS = (0xDEADBEEF, 0xF2345678, 0x60000000)
NOTHING = (0, 0, 0)
SPANS = [(1, 150, 0, 0), (3, 50, 50, 0), (2, 33, 70, 5)]


def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def poisoned(like: Tensor) -> Tensor:
    return torch.full_like(like, float("nan"))


def wide(tensor: Tensor) -> Tensor:
    return tensor.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize(("n_tokens", "rank"), [(1, 1), (65, 5), (64, 32)])
def test_down(n_tokens: int, rank: int, span: Any, dtype: torch.dtype) -> None:
    x, factor = made(n_tokens, 150, dtype=dtype), made(span[0] * span[1], rank).to(dtype).float()
    words = WORDS if rank > 1 else NOTHING
    found = kernels.low_rank_down(x, factor, span, 0.5, Dropped(words))
    truth = reference.low_rank_down(wide(x), wide(factor), span, 0.5, words)
    plain = reference.low_rank_down(x, factor, span, 0.5, words)
    assert_within_budget(found, plain, truth)
    across = kernels.low_rank_down(x, factor.t().contiguous().t(), span, 0.5, Dropped(words))
    assert torch.equal(found, across)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize(("n_tokens", "rank"), [(1, 1), (65, 5), (64, 32)])
def test_up(n_tokens: int, rank: int, span: Any, dtype: torch.dtype) -> None:
    base, factor = made(n_tokens, 150, dtype=dtype), made(span[0] * span[1], rank).to(dtype).float()
    inner = made(n_tokens, span[0] * rank + 3, dtype=dtype)[:, 2:-1]  # a part of a bottleneck
    words = WORDS if rank > 1 else NOTHING
    truth = reference.low_rank_up(wide(base), wide(inner), wide(factor), span, 0.5, words)
    plain = reference.low_rank_up(base, inner, factor, span, 0.5, words)
    for layout in (factor, factor.t().contiguous().t()):
        found = base.clone()
        kernels.low_rank_up(found, found, inner, layout, span, 0.5, Dropped(words))
        assert_within_budget(found, plain.to(dtype), truth)
    if span[0] * span[1] == 150:
        bias, found = made(150), base.clone()
        kernels.low_rank_up(found, found, inner, factor, span, 0.5, Dropped(words), bias)
        assert_within_budget(found, (plain + bias).to(dtype), truth + bias)
        elsewhere = poisoned(base).float()
        kernels.low_rank_up(base, elsewhere, inner, factor, span, 0.5, Dropped(words), bias)
        assert_within_budget(elsewhere, (plain + bias).float(), truth + bias)


@pytest.mark.parametrize("shape", [(40,), (6, 40), (2, 3, 40), (2, 0, 40)], ids=str)
def test_any_dimensions_and_a_factor_that_lies_across(shape: tuple[int, ...]) -> None:
    x, across = made(*shape), made(4, 40)
    flat, span, dropped = x.view(-1, 40), (1, 40, 0, 0), Dropped(WORDS)
    inner = kernels.low_rank_down(x, across, span, 0.5, dropped, is_across=True)
    assert torch.equal(inner, kernels.low_rank_down(flat, across.t(), span, 0.5, dropped))
    outputs = poisoned(x), poisoned(flat)
    kernels.low_rank_up(x, outputs[0], inner, across, span, 0.5, dropped, is_across=True)
    kernels.low_rank_up(flat, outputs[1], inner, across.t(), span, 0.5, dropped)
    assert torch.equal(outputs[0], outputs[1].view(shape))


def test_a_key_in_memory_is_its_words() -> None:
    x, inner, factor = made(9, 40), made(9, 4), made(40, 4)
    span = (1, 40, 0, 0)
    given, key = Dropped(WORDS), Dropped((0, 0, WORDS[2]), torch.tensor(WORDS[:2]))
    down = [kernels.low_rank_down(x, factor, span, 1.0, dropped) for dropped in (given, key)]
    up = [poisoned(x), poisoned(x)]
    for output, dropped in zip(up, (given, key), strict=True):
        kernels.low_rank_up(x, output, inner, factor, span, 1.0, dropped)
    for one, other in (down, up):
        assert torch.equal(one, other)


def test_what_is_not_a_number_stays_with_its_token() -> None:
    x, factor = made(70, 40), made(40, 4)
    x[3, 7] = float("nan")
    found = kernels.low_rank_down(x, factor, (1, 40, 0, 0), 1.0, Dropped(NOTHING))
    is_nan = found.isnan().any(1)
    assert is_nan.nonzero().flatten().tolist() == [3]


def test_the_op_knows_without_triton_which_factors_are_served() -> None:
    assert low_rank_ways.MOST_COLUMNS == MOST_COLUMNS
