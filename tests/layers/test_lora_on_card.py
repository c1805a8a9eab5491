"""LoRA layers on a card against the same on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from spt_kernels.layers import LoraLinear
from spt_kernels.layers.autograd.card_lora import dtype_on_card
from spt_kernels.layers.autograd.lora_call import LoraCall

from .lora_models import BEFORE, IN, ROWS, TOKENS, assert_close, model, run

X = torch.randn(3, TOKENS, IN, generator=torch.Generator().manual_seed(2))


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("before", BEFORE)
def test_whatever_made_the_input(before: str, dropout: float, autocast: bool) -> None:
    net = model(before, "qkv", dropout)
    expected = run(copy.deepcopy(net), X, autocast)
    assert_close(run(net.to("cuda"), X.to("cuda"), autocast), expected, autocast)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_whichever_features_it_is_on(rows: str, autocast: bool) -> None:
    net = model("gelu", rows, 0.3)
    expected = run(copy.deepcopy(net), X, autocast)
    assert_close(run(net.to("cuda"), X.to("cuda"), autocast), expected, autocast)


@pytest.mark.gpu
def test_a_step_in_16_bits_of_a_width_that_fills_blocks() -> None:
    """Of many tokens, whose gradient is summed in parts; twice, for the same bits."""
    torch.manual_seed(0)
    net = model("layer_norm", "qkv", 0.1).to("cuda", torch.bfloat16)
    x = torch.randn(40, 128, IN, device="cuda", dtype=torch.bfloat16)
    first, second = (run(copy.deepcopy(net), x, autocast=False) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_what_the_function_that_launches_itself_is_for() -> None:
    net = model("nothing", "qkv", 0.0)
    lora: Any = net[2]
    call: LoraCall = lora._this_call(X)

    def dtype(
        call: LoraCall = call, x: torch.Tensor = X, lora: LoraLinear = lora
    ) -> torch.dtype | None:
        return dtype_on_card(call, x, lora.weight, lora.lora_a, lora.lora_b)

    assert dtype() is torch.float32
    assert dtype(x=X.bfloat16()) is None  # the weight is in another dtype, without autocast
    assert dtype(x=X[:0]) is None
    assert dtype(call._replace(dropout=0.5, seed=3)) is torch.float32
    assert dtype(call._replace(dropout=1.0)) is None
    assert dtype(call._replace(groups=call.groups * 2)) is None
    assert dtype(lora=model("nothing", "qkv", 0.0, rank=11)[2]) is None  # type: ignore[arg-type]
    assert dtype(x=torch._neg_view(X)) is None
    with torch.device("meta"):
        assert dtype(x=torch.zeros(3, TOKENS, IN)) is None
    wide: Any = copy.deepcopy(lora).double()
    assert dtype(x=X.double(), lora=wide) is None
    transposed: Any = copy.deepcopy(lora)
    transposed.lora_a = nn.Parameter(lora.lora_a.detach().t().contiguous().t())
    assert dtype(lora=transposed) is None
