"""The Adapter against the same modules written out with nn.Linear."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spt_kernels import AdapterSpec
from spt_kernels.layers import AdapterLinear, sparse_deltas

from .truth import sparse_linear, tokens


def adapter(rows: tuple[tuple[int, int], ...], base: nn.Module | None = None) -> AdapterLinear:
    torch.manual_seed(0)
    layer = AdapterLinear(base or nn.Linear(8, 6), AdapterSpec(2, rows))
    for name, parameter in layer.named_parameters():
        if name.startswith("up"):
            parameter.data.normal_()
    return layer


def written_out(layer: AdapterLinear, x: Tensor) -> tuple[Tensor, list[nn.Module]]:
    y = F.linear(x, layer.weight, layer.bias)
    pieces, modules, own, last = [], [], 0, 0
    for i, (start, stop) in enumerate(layer.spec.rows):
        width = stop - start
        down, up = nn.Linear(width, 2), nn.Linear(2, width)
        down.weight.data.copy_(layer.down_weight[:, own : own + width])
        down.bias.data.copy_(layer.down_bias[2 * i : 2 * i + 2])
        up.weight.data.copy_(layer.up_weight[own : own + width])
        up.bias.data.copy_(layer.up_bias[own : own + width])
        part = y[..., start:stop]
        pieces += [y[..., last:start], part + up(nn.GELU()(down(part)))]
        modules += [down, up]
        own, last = own + width, stop
    return torch.cat([*pieces, y[..., last:]], -1), modules


@pytest.mark.parametrize("rows", [((0, 6),), ((0, 2), (4, 6)), ((1, 5),)], ids=str)
def test_output_and_gradients(rows: tuple[tuple[int, int], ...]) -> None:
    layer, x, leaf = adapter(rows), tokens(3, 5, 8), tokens(3, 5, 8)
    y = layer(x)
    y.square().sum().backward()
    expected, modules = written_out(layer, leaf)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, leaf.grad)
    downs, ups = modules[::2], modules[1::2]
    for own, parts in {
        layer.down_weight: torch.cat([m.weight.grad for m in downs], 1),
        layer.down_bias: torch.cat([m.bias.grad for m in downs]),
        layer.up_weight: torch.cat([m.weight.grad for m in ups]),
        layer.up_bias: torch.cat([m.bias.grad for m in ups]),
    }.items():
        torch.testing.assert_close(own.grad, parts)


def test_starts_as_the_base_layer_and_trains_only_itself() -> None:
    base = nn.Linear(8, 6)
    layer = AdapterLinear(base, AdapterSpec(2, ((0, 6),)))
    x = tokens(3, 8)
    assert torch.equal(layer(x), base(x))
    assert layer.spec.num_parameters == sum(
        p.numel() for p in layer.parameters() if p.requires_grad
    )
    assert bool((layer.down_weight != 0).all())
    assert float(layer.down_weight.detach().abs().max()) <= (1 / 6) ** 0.5


def test_on_a_sparse_layer_both_train() -> None:
    layer = adapter(((0, 6),), sparse_linear())
    layer(F.gelu(tokens(3, 5, 8))).square().sum().backward()
    weight = layer.weight.detach().clone().requires_grad_()
    twin = copy.deepcopy(layer)
    twin._parameters["weight"] = weight
    expected, _ = written_out(twin, F.gelu(tokens(3, 5, 8)))
    expected.square().sum().backward()
    for delta in sparse_deltas(layer).values():
        if delta.target is layer.weight:
            dense = weight.grad.flatten()[delta.index.long()]
            torch.testing.assert_close(delta.delta.grad, dense)


def test_stays_fp32_under_a_bf16_base_and_runs_under_autocast() -> None:
    layer = adapter(((0, 6),)).bfloat16()
    assert layer.down_weight.dtype == layer.up_bias.dtype == torch.float32
    y = layer(tokens(3, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.up_weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        adapter(((0, 6),))(tokens(3, 8)).float().sum().backward()
