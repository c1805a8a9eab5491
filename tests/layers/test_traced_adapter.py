"""An Adapter's down-projection whose gradient comes from its layer's input, not its output."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from spt_kernels.layers.traced_adapter import TracedDown


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("rows", [slice(0, 6), slice(2, 5)], ids=["all", "some"])
def test_gradients_are_those_of_the_plain_layers(rows: slice, has_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 4), (6, 4)))
    bias = torch.randn(6, dtype=torch.float64) if has_bias else None
    down = torch.randn(2, rows.stop - rows.start, dtype=torch.float64, requires_grad=True)
    down_bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    y = F.linear(x, weight, bias)[..., rows].clone().requires_grad_()
    weights = torch.randn(2, 3, 2, dtype=torch.float64)

    low = TracedDown.apply(y, down, down_bias, x, weight, bias, rows)
    actual = torch.autograd.grad((low * weights).sum(), (y, down, down_bias))
    plain = F.linear(y, down, down_bias)
    assert torch.equal(low, plain)
    expected = torch.autograd.grad((plain * weights).sum(), (y, down, down_bias))
    torch.testing.assert_close(actual, expected)
