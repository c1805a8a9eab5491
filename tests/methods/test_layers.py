"""The layers of methods that are not ours compute what their papers say."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_kernels.methods.dense_gradient import MaskedLinear
from spt_kernels.methods.plain_lora import PlainLora
from spt_kernels.methods.prompted import PromptedBlock
from spt_kernels.methods.published_layer import DiagonalLinear


def linear_and_inputs() -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(5, 4).double()
    return linear, torch.randn(2, 3, 5).double(), torch.tensor([1, 7, 19])


def dense_gradient(linear: nn.Linear, x: Tensor) -> Tensor:
    weight = linear.weight.detach().clone().requires_grad_()
    F.linear(x, weight, linear.bias).square().sum().backward()
    assert weight.grad is not None
    return weight.grad


def test_masked_linear_keeps_the_chosen_of_the_dense_gradient() -> None:
    linear, x, index = linear_and_inputs()
    expected = dense_gradient(linear, x)
    layer = MaskedLinear(linear, index)
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    chosen = layer.weight.grad.flatten()[index]
    torch.testing.assert_close(chosen, expected.flatten()[index])
    assert layer.weight.grad.count_nonzero() == len(index)
    assert layer.folded() is linear


def test_diagonal_linear_has_the_gradients_of_autograd() -> None:
    linear, x, index = linear_and_inputs()
    expected = dense_gradient(linear, x).flatten()[index]
    expected_x = x.clone().requires_grad_()
    linear(expected_x).square().sum().backward()
    layer = DiagonalLinear(linear.requires_grad_(False), index)
    own_x = x.clone().requires_grad_()
    layer(own_x).square().sum().backward()
    torch.testing.assert_close(layer.delta.grad, expected.float())
    torch.testing.assert_close(own_x.grad, expected_x.grad)


def test_diagonal_linear_merges_its_values() -> None:
    linear, x, index = linear_and_inputs()
    layer = DiagonalLinear(linear.requires_grad_(False), index)
    layer.delta.data.copy_(torch.tensor([0.5, -1.0, 2.0]))
    before = layer(x)
    torch.testing.assert_close(layer.folded()(x), before)


def test_plain_lora_merges_its_product() -> None:
    linear, x, _ = linear_and_inputs()
    layer = PlainLora(linear.float(), 2)
    nn.init.normal_(layer.up.weight)
    before = layer(x.float())
    torch.testing.assert_close(layer.folded()(x.float()), before)


class MeanOverTokens(nn.Module):
    """A block in which every token sees all others."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


def test_prompted_block_lets_prompts_be_seen_and_drops_them() -> None:
    x = torch.randn(2, 6, 4)  # a class token and five patches
    block = PromptedBlock(MeanOverTokens(), nn.Parameter(torch.ones(3, 4)), num_prefix=1)
    mean = (x.sum(1, keepdim=True) + 3) / 9
    torch.testing.assert_close(block(x), x + mean)
