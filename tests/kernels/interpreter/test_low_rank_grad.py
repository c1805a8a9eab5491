"""The kernel of a LoRA's gradient, interpreted, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.kernels.low_rank_grad import low_rank_grad
from spt_kernels.kernels.low_rank_parts import MOST_COLUMNS, Dropped
from spt_kernels.reference import low_rank as reference
from tests.tolerance import assert_within_budget

DTYPES = list(MOST_COLUMNS)
WORDS = (0xDEADBEEF, 0xF2345678, 0x60000000)
NOTHING = (0, 0, 0)
NO_NORM = (None, None, None, None)


def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("words", [NOTHING, WORDS], ids=["all", "some"])
@pytest.mark.parametrize(("n_tokens", "rank"), [(0, 3), (1, 1), (65, 5), (1100, 17)])
def test_grad(n_tokens: int, rank: int, words: Any, dtype: torch.dtype) -> None:
    x, grad_inner = made(n_tokens, 70, dtype=dtype), made(n_tokens, rank, dtype=dtype)
    found = low_rank_grad(x, grad_inner, Dropped(words), "none", NO_NORM)
    truth = reference.low_rank_grad(x.double(), grad_inner.double(), words)
    assert_within_budget(found, reference.low_rank_grad(x, grad_inner, words), truth)
    assert torch.equal(found, low_rank_grad(x, grad_inner, Dropped(words), "none", NO_NORM))


@pytest.mark.parametrize(("dtype", "narrow"), [(d, d) for d in DTYPES] + [(DTYPES[0], DTYPES[1])])
@pytest.mark.parametrize("activation", ["gelu", "tanh", "layer_norm"])
@pytest.mark.parametrize("has", [(True, True), (True, False), (False, True), (False, False)])
def test_grad_of_an_input_that_is_made_on_the_way(
    has: tuple[bool, bool], activation: Any, dtype: torch.dtype, narrow: torch.dtype
) -> None:
    source, inner = made(70, 75, dtype=dtype), made(70, 6, dtype=narrow)
    norm: Any = NO_NORM
    if activation == "layer_norm":
        weight, bias = (made(75, dtype=dtype) if given else None for given in has)
        norm = (source.float().mean(1), source.float().var(1).rsqrt(), weight, bias)
    elif any(has):
        return
    found = low_rank_grad(source, inner, Dropped(WORDS), activation, norm)
    expected = reference.low_rank_grad(source, inner, WORDS, activation, norm)
    # an activation may be rounded to the other of two neighbours
    close = 4 * torch.finfo(narrow).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=close)


def test_a_key_in_memory_is_its_words() -> None:
    x, inner = made(9, 40), made(9, 4)
    found = [
        low_rank_grad(x, inner, dropped, "none", NO_NORM)
        for dropped in (Dropped(WORDS), Dropped((0, 0, WORDS[2]), torch.tensor(WORDS[:2])))
    ]
    assert torch.equal(*found)
