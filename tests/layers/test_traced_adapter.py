"""An Adapter for compilers, whose gradients come from its layer's input, not its output."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from spt_kernels.layers.autograd.traced_adapter import FrozenBase, TracedAdapter


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("rows", [slice(0, 6), slice(2, 5)], ids=["all", "some"])
def test_gradients_are_those_of_the_plain_layers(rows: slice, has_bias: bool) -> None:
    torch.manual_seed(0)
    width = rows.stop - rows.start
    x, weight = drawn(2, 3, 4).detach(), drawn(6, 4).detach()
    bias = drawn(6).detach() if has_bias else None
    parameters = drawn(2, width), drawn(2), drawn(width, 2), drawn(width)
    down, down_bias, up, up_bias = parameters
    y = F.linear(x, weight, bias)[..., rows].clone().requires_grad_()
    weights = torch.randn(2, 3, width, dtype=torch.float64)

    update = TracedAdapter.apply(y, x, *parameters, FrozenBase(weight, bias, rows))
    actual = torch.autograd.grad((update * weights).sum(), (y, *parameters))
    plain = F.linear(F.gelu(F.linear(y, down, down_bias)), up, up_bias)
    torch.testing.assert_close(update, plain)
    expected = torch.autograd.grad((plain * weights).sum(), (y, *parameters))
    torch.testing.assert_close(actual, expected)
