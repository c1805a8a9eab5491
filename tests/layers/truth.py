"""The independent truth for a sparse layer: the plain layer with dense autograd, masked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spt_kernels.layers import SparseDeltaLinear
from tests.tolerance import assert_within_budget

Net = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]

# in [6, 8]: columns 0, 1, 3, 4, 5
INDEX = torch.tensor([0, 1, 3, 4, 9, 12, 13, 16, 19, 20, 21, 24, 25, 28, 32, 33, 37, 43, 44])
BIAS_INDEX = torch.tensor([1, 4])


@dataclass
class Gradients:
    output: Tensor
    x: Tensor | None
    weight: Tensor  # at INDEX
    bias: Tensor  # at BIAS_INDEX


def sparse_linear(dtype: torch.dtype = torch.float32, seed: int = 0) -> SparseDeltaLinear:
    """An 8 -> 6 layer whose deltas are not zero."""
    torch.manual_seed(seed)
    layer = SparseDeltaLinear(nn.Linear(8, 6).to(dtype), INDEX, BIAS_INDEX)
    with torch.no_grad():
        layer.delta.normal_(std=0.1)
        layer.bias_delta.normal_(std=0.1)
    for delta in layer.sparse_deltas().values():
        delta.write()
    return layer


def dense_twin(layer: SparseDeltaLinear, dtype: torch.dtype | None = None) -> nn.Linear:
    """A plain layer with the weights that the sparse one should compute with, all trained."""
    plain = nn.Linear(layer.in_features, layer.out_features, dtype=layer.weight.dtype)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(layer.bias)
    return plain.to(dtype)


def run_plain(
    net: Net, layer: SparseDeltaLinear, x: Tensor, dtype: torch.dtype | None = None, seed: int = 7
) -> Gradients:
    plain = dense_twin(layer, dtype)
    leaf = x.detach().to(dtype or x.dtype, copy=True).requires_grad_(x.requires_grad)
    torch.manual_seed(seed)
    output = net(leaf, plain)
    _loss(output).backward()
    assert plain.weight.grad is not None
    assert plain.bias.grad is not None
    return Gradients(
        output.detach(),
        leaf.grad,
        plain.weight.grad.flatten()[INDEX],
        plain.bias.grad[BIAS_INDEX],
    )


def run_sparse(net: Net, layer: SparseDeltaLinear, x: Tensor, seed: int = 7) -> Gradients:
    leaf = x.detach().clone().requires_grad_(x.requires_grad)
    layer.zero_grad()
    torch.manual_seed(seed)
    output = net(leaf, layer)
    _loss(output).backward()
    assert layer.delta.grad is not None
    assert layer.bias_delta.grad is not None
    assert layer.weight.grad is None, "a gradient of the whole weight was made"
    return Gradients(output.detach(), leaf.grad, layer.delta.grad, layer.bias_delta.grad)


def check_gradients(net: Net, layer: SparseDeltaLinear, x: Tensor) -> Gradients:
    """Run both ways and in float64, and hold every gradient against the error budget."""
    actual = run_sparse(net, layer, x)
    plain = run_plain(net, layer, x)
    truth = run_plain(net, layer, x, torch.float64)
    for name in ("output", "x", "weight", "bias"):
        own, dense, exact = (getattr(g, name) for g in (actual, plain, truth))
        assert (own is None) == (dense is None), name
        if own is not None:
            assert_within_budget(own, dense, exact)
    return actual


def _loss(output: Tensor) -> Tensor:
    # a gradient that differs everywhere
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=torch.float64).view(output.shape)
    return (output.double() * weights).sum() + output.double().square().sum()


def tokens(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 3, grad: bool = True
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)
