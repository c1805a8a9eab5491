"""Inputs so small that they are kept: to make them again would take longer than their product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spt_kernels import AdapterSpec, LoraSpec, Plan, apply, estimate_memory
from spt_kernels.layers import LoraLinear, SparseDeltaConv2d, SparseDeltaLinear
from spt_kernels.layers.autograd import saved_input
from spt_kernels.model import describe
from tests.models import tiny_vit

from .test_memory import block
from .truth import check_gradients, sparse_linear, tokens

SMALL = 4 * 5 * 8  # elements, of the inputs here


@pytest.fixture(autouse=True)
def _some_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_input, "SMALL", SMALL)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],))


PRODUCERS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "layer_norm": layer_norm,
    "relu": F.relu,
    "leaf": lambda x: x,
    "a view": lambda x: F.gelu(x)[:, :3],
}


def entries(width: int) -> SparseDeltaLinear:
    return SparseDeltaLinear(nn.Linear(width, 6), torch.tensor([0, 1, width + 3]))


def lora(width: int) -> LoraLinear:
    return LoraLinear(nn.Linear(width, 6), LoraSpec(2, ((0, 6),), width, dropout=0.0))


def saved_by(layer: nn.Module, x: Tensor) -> tuple[str, list[Tensor]]:
    node: Any = layer(x).grad_fn
    return node.saved_input.kind, [each for each in node.saved_tensors if each is not None]


@pytest.mark.parametrize("make", [entries, lora])
@pytest.mark.parametrize("name", ["gelu", "layer_norm", "leaf"])
def test_up_to_which_size_an_input_is_kept(name: str, make: Callable[[int], nn.Module]) -> None:
    layer = make(8)
    x = PRODUCERS[name](tokens(4, 5, 8))
    kind, saved = saved_by(layer, x)
    assert kind == "tensor"
    assert any(each.data_ptr() == x.data_ptr() for each in saved)  # as it is, not a copy

    larger = PRODUCERS[name](tokens(5, 5, 8))
    kind, saved = saved_by(layer, larger)
    if name != "leaf":
        assert kind == name
        assert all(each.data_ptr() != larger.data_ptr() for each in saved)
    else:
        assert kind == ("columns" if make is entries else "tensor")


def test_a_small_part_of_a_large_activation_is_not_kept_for_its_size() -> None:
    """It would keep all of the activation, of which the layer needs three columns."""
    large = layer_norm(tokens(64, 64, 8))
    kind, saved = saved_by(entries(8), large[:, 0][:20])
    assert kind == "columns"
    assert max(each.untyped_storage().nbytes() for each in saved) < 64 * 64 * 8 * 4


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", PRODUCERS)
def test_gradients_are_those_of_the_plain_layer(name: str, autocast: bool) -> None:
    def net(x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return layer(PRODUCERS[name](x))

    check_gradients(net, sparse_linear(), tokens(4, 5, 8))


def test_a_convolution_keeps_its_small_input_too() -> None:
    layer = SparseDeltaConv2d(nn.Conv2d(4, 6, 3, groups=2), torch.tensor([0, 1]))
    x = F.gelu(tokens(1, 4, 6, 6))
    kind, saved = saved_by(layer, x)
    assert x.numel() <= SMALL
    assert kind == "tensor"
    assert any(each.data_ptr() == x.data_ptr() for each in saved)


def test_an_edit_of_what_is_kept_is_found() -> None:
    """As of the input of a plain layer, where one that is made again would not have minded."""
    x = F.gelu(tokens(4, 5, 8))
    y = entries(8)(x)
    with torch.no_grad():
        x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", ["entries", "lora", "adapter"])
def test_small_and_large_inputs_give_the_same_gradients(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = block()
    info = describe(model)
    matrices = [name for name, what in info.items() if what.kind == "linear"]
    specs: dict[str, Any] = {}
    for name in matrices:
        n_out, n_in = info[name].shape
        if kind == "lora":
            specs[name] = LoraSpec(2, ((0, n_out),), n_in, dropout=0.0)
        elif kind == "adapter":
            specs[name] = AdapterSpec(2, ((0, n_out),))
    positions = {} if specs else {n: torch.arange(0, info[n].numel, 97) for n in matrices}
    apply(model, Plan(positions, specs, info))
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.02)

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model(x).square().sum(), [x, *trained]))

    found = []
    for small in (-1, 2**14):
        monkeypatch.setattr(saved_input, "SMALL", small)
        found.append(gradients())
    for large, small_ones in zip(*found, strict=True):
        torch.testing.assert_close(small_ones, large, rtol=1e-5, atol=1e-5)


def test_what_is_kept_for_its_size_is_accounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates go by the same rule."""
    model = tiny_vit()
    info = describe(model)
    matrices = [name for name, what in info.items() if what.kind == "linear"]
    apply(model, Plan({n: torch.arange(0, info[n].numel, 97) for n in matrices}, {}, info))
    activations = []
    for small in (-1, 2**14):
        monkeypatch.setattr(saved_input, "SMALL", small)
        estimate = estimate_memory(model, (2, 3, 16, 16))
        activations.append(estimate.by_category["activations"])
    assert 0 < activations[0] < activations[1]
