"""What launchers make for themselves is in fp32 and in its place, whatever torch's defaults are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from spt_kernels.gradient_ways.gradient_cost import Way
from spt_kernels.gradient_ways.tile_plan import plan_tiles
from spt_kernels.kernels import fingerprint, sparse_weight_grad, squared_grad, top_tau, write_delta
from tests.card.pretend import pretended_card
from tests.optim.runs import Run, assert_close

from .entries import noise, positions


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request: Any) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("way", list(Way), ids=lambda way: way.value)
def test_entries_of_a_gradient(
    way: Way, default_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_weight_grad, "cheapest_way", lambda *a, **k: way)
    monkeypatch.setattr(sparse_weight_grad, "_DENSE_NUMEL", 0)
    index = positions(200, 130 * 160)
    plan = plan_tiles(index, 130, 160)
    factors = (noise(70, n, seed=n, dtype=torch.float32) for n in (130, 160))
    grad_output, x = factors

    def gradients() -> list[Tensor]:
        none = grad_output[:0], x[:0]
        every = [(grad_output, x), none]
        return [sparse_weight_grad.sparse_weight_grad(*pair, index, plan) for pair in every]

    expected = gradients()
    torch.set_default_dtype(default_dtype)
    for found, own in zip(gradients(), expected, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_squared_gradients(dtype: torch.dtype, default_dtype: torch.dtype) -> None:
    factors = [noise(3, 7, n, seed=n, dtype=dtype) for n in (130, 70)]
    expected, found = torch.zeros(2, 130, 70)
    squared_grad.accumulate_squared_grad(expected, *factors, 2.0)
    torch.set_default_dtype(default_dtype)
    squared_grad.accumulate_squared_grad(found, *factors, 2.0)
    assert torch.equal(found, expected)


def test_tables_of_addresses_are_made_on_the_host() -> None:
    index, weight = positions(40, 300), noise(300, seed=0, dtype=torch.float32)
    scores = [weight.abs(), weight.square()]

    def run() -> list[Tensor]:
        target = weight.clone()
        write_delta.write_delta([target], [index], [weight[:40]], [weight[40:80]])
        return [target, *top_tau.top_tau(scores, 30, [300, 300])]

    expected = run()
    with torch.device("meta"):
        found = run()
        fingerprint.fingerprint([weight], [index[:0]], [weight[:0]])
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)


def test_steps_of_an_optimizer() -> None:
    with pretended_card():
        ours, expected = Run("cuda"), Run("cuda").steps(4)
        for _ in range(4):
            ours.new_grads()
            with torch.device("meta"):
                ours.optimizer.step()
        assert_close(ours, expected)
