"""Parameters that plain autograd measures, one sample at a time, each gradient as it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spt_kernels as spt

from .per_sample_truth import assert_exact

PRODUCT = "bi,oi->bo"  # which is no call that is seen
Apply = Callable[[Tensor, Tensor], Tensor]


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum(PRODUCT, x, weight).tanh()


def checkpointed(x: Tensor, weight: Tensor) -> Tensor:
    return checkpoint(lambda x: plain(x, weight), x, use_reentrant=True)


class Within(torch.autograd.Function):
    """Runs a backward pass of its own within the backward pass, as reversible networks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_(True)
            ctx.y = plain(ctx.x, weight)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        ctx.y.backward(grad_output, retain_graph=True)
        gradient, ctx.x.grad = ctx.x.grad, None
        return gradient, None


class Once(torch.autograd.Function):
    """Keeps the graph of a call to itself; nothing leads there but the input, and that but once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_(True)
            ctx.y = call(ctx.x)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        ctx.y.backward(grad_output)
        return ctx.x.grad, None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(x, weight).tanh()


def derived(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(x, weight.exp()).tanh()


class Unseen(nn.Module):
    """Two matrices that are used out of sight, of which the first may be used again."""

    def __init__(self, apply: Apply, *, again: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.apply_to, self.again = apply, again
        self.stem = nn.Linear(6, 7)
        self.first, self.second = (nn.Parameter(torch.randn(7, 7)) for _ in range(2))
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.apply_to(self.stem(x), self.first)
        x = self.apply_to(x, self.first if self.again else self.second)
        return self.head(self.norm(x))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 6, generator=generator), torch.arange(3)


def measured(model: nn.Module) -> spt.Sensitivity:
    return spt.measure_sensitivity(model, [batch()], num_samples=3, include=["first", "second"])


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("apply", [plain, checkpointed])
def test_uses_out_of_sight_are_exact(apply: Apply, again: bool) -> None:
    sensitivity = measured(Unseen(apply, again=again))
    assert sensitivity.fallback == (("first",) if again else ("first", "second"))
    assert_exact(sensitivity, Unseen(plain, again=again), [batch()])


def test_hooks_and_gradients_of_parameters_are_let_be() -> None:
    model, calls = Unseen(plain), []
    model.first.register_hook(lambda gradient: calls.append(1) or gradient * 0)
    model.first.register_post_accumulate_grad_hook(lambda parameter: calls.append(2))
    model.first.grad = torch.ones(7, 7)
    sensitivity = measured(model)
    assert not calls
    assert torch.equal(model.first.grad, torch.ones(7, 7))
    assert_exact(sensitivity, Unseen(plain), [batch()])


def test_what_was_measured_so_is_trained_like_any_other() -> None:
    model = Unseen(plain)
    assert measured(model).fallback
    twin = Unseen(plain)
    for each in (model, twin):
        torch.nn.functional.cross_entropy(each(batch()[0]), batch()[1]).backward()
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


def test_a_backward_pass_within_another_one_is_exact() -> None:
    sensitivity = measured(Unseen(lambda x, weight: Within.apply(x, weight)))
    assert_exact(sensitivity, Unseen(plain), [batch()])


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("apply", [plain, linear, derived])
def test_a_graph_that_a_function_keeps_to_itself_is_exact(apply: Apply, again: bool) -> None:
    def kept(x: Tensor, weight: Tensor) -> Tensor:
        return Once.apply(x, lambda x: apply(x, weight))

    sensitivity = measured(Unseen(kept, again=again))
    assert_exact(sensitivity, Unseen(apply, again=again), [batch()])


def test_a_gradient_in_parts_is_never_squared_part_by_part() -> None:
    model = Unseen(lambda x, weight: Within.apply(x, weight), again=True)
    with pytest.raises(RuntimeError, match="the gradient of first comes in parts"):
        measured(model)
    assert model.first.grad is None
