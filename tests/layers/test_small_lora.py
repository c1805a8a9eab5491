"""LoRAs whose products the C++ does in one go, and which keep their inputs."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import spt_kernels as spt
from spt_kernels import LoraSpec
from spt_kernels.layers import LoraLinear
from spt_kernels.layers.autograd import low_rank_linear
from spt_kernels.ops.native_calls import available

from .truth import tokens

pytestmark = pytest.mark.skipif(not available(), reason="there is no C++ here")


def lora(n_in: int = 8, n_out: int = 6) -> LoraLinear:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(n_in, n_out), LoraSpec(2, ((0, n_out),), n_in, dropout=0.0))
    nn.init.normal_(layer.lora_b)
    return layer


def gradients(net: Callable[[Tensor], Tensor], layer: LoraLinear) -> list[Tensor]:
    x = tokens(20, 8)
    y = net(x)
    return list(torch.autograd.grad(y.square().sum(), [x, layer.lora_a, layer.lora_b]))


def by_the_library(make: Callable[[Tensor], Tensor] = F.gelu) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spt_kernels.layers.lora.small_shape", lambda *_: None)
        layer = lora()
        return gradients(lambda x: layer(make(x)), layer)


def kept_by(y: Tensor) -> list[Tensor]:
    node: Any = y.grad_fn
    return [each for each in node.saved_tensors if each is not None]


@pytest.mark.parametrize("make", [F.gelu, lambda x: F.layer_norm(x, (8,))], ids=["gelu", "norm"])
def test_an_input_is_kept_as_it_is(make: Callable[[Tensor], Tensor]) -> None:
    layer, h = lora(), make(tokens(20, 8))
    y = layer(h)
    assert "SmallLowRankLinear" in type(y.grad_fn).__name__
    assert any(each.data_ptr() == h.data_ptr() for each in kept_by(y))
    torch.testing.assert_close(
        gradients(lambda x: layer(make(x)), layer), by_the_library(make), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "hooks",
    [
        save_on_cpu,
        lambda: saved_tensors_hooks(lambda t: t.double(), lambda t: t.float()),
        lambda: saved_tensors_hooks(lambda t: t, lambda t: t.t().contiguous().t()),
    ],
    ids=["save_on_cpu", "another dtype", "another layout"],
)
@pytest.mark.parametrize("make", [F.gelu, lambda x: 2 * x], ids=["gelu", "leaf"])
def test_hooks_of_what_is_saved(make: Callable[[Tensor], Tensor], hooks: Any) -> None:
    layer = lora()

    def net(x: Tensor) -> Tensor:
        with hooks():
            return layer(make(x))

    torch.testing.assert_close(gradients(net, layer), by_the_library(make), rtol=1e-5, atol=1e-5)


def test_hooks_that_a_saved_tensor_is_given_afterwards() -> None:
    """Of another layout and dtype than the C++ was told of."""
    layer = lora()

    def net(x: Tensor) -> Tensor:
        y = layer(F.gelu(x))
        node: Any = y.grad_fn
        node._raw_saved_tensors[-1].register_hooks(
            lambda t: t.double(), lambda t: t.float().t().contiguous().t()
        )
        return y

    torch.testing.assert_close(gradients(net, layer), by_the_library(), rtol=1e-5, atol=1e-5)


def test_an_edit_of_what_is_kept_is_found() -> None:
    """As with a plain layer, whose weight is trained."""
    h = F.gelu(tokens(20, 8))
    y = lora()(h)
    with torch.no_grad():
        h.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = lora(16, 128), lora(128, 16)
        self.inner = nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.inner(F.gelu(self.fc1(x)))))


class Model(nn.Module):
    """Whose blocks get views, as outputs of a plain Linear are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Linear(8, 16)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_blocks_that_are_computed_again(autocast: bool) -> None:
    model, x = Model(), torch.randn(4, 5, 8)
    trained = [p for name, p in model.named_parameters() if "lora" in name]

    def gradients() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        return list(torch.autograd.grad(y.float().square().sum(), trained))

    expected = gradients()
    spt.recompute(model, "block")
    for found, each in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, each, rtol=1e-4, atol=1e-5)


def test_a_copy_where_there_is_no_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, buffer = lora(), io.BytesIO()
    expected = layer(tokens(20, 8))
    torch.save(layer, buffer)
    buffer.seek(0)
    monkeypatch.setattr(low_rank_linear, "_HAS_CPP", False)
    monkeypatch.setattr(low_rank_linear, "launch_lora", None)
    again = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(again(tokens(20, 8)), expected)
