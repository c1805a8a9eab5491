"""LoRA layers on a pretended card, whose products are kernels, against the same on the CPU."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn

from spt_kernels.layers import LoraLinear
from spt_kernels.layers.autograd import card_lora
from spt_kernels.layers.autograd.card_lora import CardLowRankLinear
from tests.card.pretend import pretended_card
from tests.layers.lora_models import BEFORE, IN, ROWS, TOKENS, assert_close, model, run


class Launching(nn.Module):
    """A LoRA layer as on a card, by the function that launches the kernels itself."""

    def __init__(self, lora: LoraLinear) -> None:
        super().__init__()
        self.lora = lora

    def forward(self, x: Tensor) -> Tensor:
        lora, call = self.lora, self.lora._this_call(x)
        tensors = lora.weight, lora.bias, lora.lora_a, lora.lora_b
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
        return CardLowRankLinear.apply(x, *tensors, call, dtype)


def assert_a_card_agrees(net: nn.Sequential, autocast: bool) -> None:
    x = torch.randn(3, TOKENS, IN, generator=torch.Generator().manual_seed(2))
    expected = run(copy.deepcopy(net), x, autocast)
    with pretended_card():
        found = run(net.to("cuda"), x.to("cuda"), autocast)
    assert_close(found, expected, autocast)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("before", BEFORE)
def test_whatever_made_the_input(before: str, dropout: float, autocast: bool) -> None:
    assert_a_card_agrees(model(before, "qkv", dropout), autocast)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_whichever_features_it_is_on(rows: str, autocast: bool) -> None:
    assert_a_card_agrees(model("gelu", rows, 0.3), autocast)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("before", "rows"), [*((before, "qkv") for before in BEFORE), ("gelu", "all"), ("gelu", "some")]
)
def test_the_function_that_launches_itself(
    before: str, rows: str, dropout: float, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card_lora, "on_card", lambda _: contextlib.nullcontext())
    net = model(before, rows, dropout)
    x = torch.randn(3, TOKENS, IN, generator=torch.Generator().manual_seed(2))
    expected = run(copy.deepcopy(net), x, autocast)
    net[2] = Launching(net[2])
    found = {name.replace("lora.", ""): tensor for name, tensor in run(net, x, autocast).items()}
    assert_close(found, expected, autocast)


def test_of_more_columns_than_the_kernels_take() -> None:
    assert_a_card_agrees(model("layer_norm", "qkv", 0.3, rank=11), autocast=False)


def test_without_a_gradient() -> None:
    net = model("gelu", "qkv", 0.0).eval()
    x = torch.randn(3, TOKENS, IN)
    with torch.no_grad():
        expected = net(x)
        with pretended_card():
            found = net.to("cuda")(x.to("cuda")).cpu()
    torch.testing.assert_close(found, expected)
