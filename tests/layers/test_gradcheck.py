"""Gradients of the input, in float64 against finite differences, through every tuned layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spt_kernels.layers import (
    AdapterLinear,
    LoraLinear,
    SparseDeltaConv2d,
    SparseDeltaLinear,
    SparseDeltaNorm,
)
from spt_kernels.plan import AdapterSpec, LoraSpec

INDEX = torch.tensor([0, 3, 7])


def sparse(bias: bool = True) -> SparseDeltaLinear:
    return SparseDeltaLinear(nn.Linear(4, 6, bias=bias), INDEX, INDEX[:2] if bias else None)


def after_norm(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(4), layer, nn.GELU(), nn.Linear(6, 2))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": sparse,
    "linear without bias": lambda: sparse(bias=False),
    "linear after a norm": lambda: after_norm(sparse()),
    "lora": lambda: LoraLinear(nn.Linear(4, 6), LoraSpec(2, ((0, 2), (4, 6)), 4, 0.5, 0.0)),
    "lora on a sparse linear": lambda: after_norm(
        LoraLinear(sparse(), LoraSpec(1, ((2, 4),), 4, 1.0, 0.0))
    ),
    "adapter": lambda: AdapterLinear(sparse(), AdapterSpec(2, ((2, 6),))),
    "conv": lambda: SparseDeltaConv2d(nn.Conv2d(4, 6, 1), INDEX, INDEX[:1]),
    "norm": lambda: SparseDeltaNorm(nn.LayerNorm(4), INDEX[:2], INDEX[:2]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_of_the_input(name: str) -> None:
    torch.manual_seed(0)
    module = LAYERS[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    module.double()
    shape = (2, 4, 1, 2) if name == "conv" else (2, 3, 4)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return module(x)

    assert torch.autograd.gradcheck(run, (x,), check_undefined_grad=False)
