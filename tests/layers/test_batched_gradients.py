"""Many gradients in one call of `torch.autograd.grad`, which kernels take one after the other."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._vmap_internals import _vmap
from torch.autograd.functional import jacobian

from spt_kernels.approximation import approximate
from spt_kernels.layers import AdapterLinear
from spt_kernels.layers.autograd.plain_backward import plain_backward
from spt_kernels.ops import low_rank_ways
from spt_kernels.ops.launching import as_on_card
from spt_kernels.plan import AdapterSpec

from .test_gradcheck import LAYERS, sparse

norms = sys.modules["spt_kernels.ops.sparse_norm_grad"]  # whose name is a function's as well
WHOLE = AdapterSpec(2, ((0, 6),))


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = LAYERS[name]() if name in LAYERS else AdapterLinear(nn.Linear(4, 6), WHOLE)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def as_launched(implementation: Callable[..., object]) -> Callable[..., object]:
    """What the reference does, where tensors have addresses, as launches of kernels ask them."""

    def run(*arguments: object) -> object:
        for argument in arguments:
            if isinstance(argument, Tensor):
                argument.contiguous().data_ptr()
        return implementation(*arguments)

    return run


@pytest.mark.parametrize("on_card", [False, True])
@pytest.mark.parametrize("name", [*LAYERS, "adapter on all rows"])
def test_each_is_what_it_is_alone(
    name: str, on_card: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "_on_cpu", as_launched(norms._on_cpu))
    for way in ("down", "up", "up_", "grad"):
        monkeypatch.setattr(low_rank_ways, way, as_launched(getattr(low_rank_ways, way)))
    module = net(name)
    x = torch.randn((2, 4, 1, 2) if name == "conv" else (2, 3, 4), requires_grad=True)
    with as_on_card() if on_card else contextlib.nullcontext():
        y = module(x)
        inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
        vectors = torch.randn(5, *y.shape)
        found = torch.autograd.grad(y, inputs, vectors, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(y, inputs, vector, retain_graph=True) for vector in vectors]
    assert len(inputs) > 1
    for n, grads in enumerate(zip(*each, strict=True)):
        assert torch.equal(found[n], torch.stack(grads))


def test_a_vectorized_jacobian() -> None:
    module, x = net("linear after a norm"), torch.randn(3, 4)
    assert torch.equal(jacobian(module, x, vectorize=True), jacobian(module, x))


def test_of_an_approximated_model() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), sparse(), nn.GELU())
    approximate(module, gelu="8bit", layer_norm="from-output")
    x = torch.randn(3, 4)
    assert torch.equal(jacobian(module, x, vectorize=True), jacobian(module, x))


def test_batches_within_one_another_are_refused() -> None:
    @plain_backward
    def backward(ctx: None, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None

    one = torch.ones(3, 2)
    assert torch.equal(_vmap(lambda grad: backward(None, grad)[0])(one), one)
    with pytest.raises(NotImplementedError, match="batches of gradients within one another"):
        _vmap(lambda a: _vmap(lambda b: backward(None, a * b)[0])(one))(torch.ones(4, 2))
