"""LoRA layers on a pretended card, whose products are kernels, against the same on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_kernels.layers import LoraLinear
from spt_kernels.plan import LoraSpec
from tests.card.pretend import pretended_card

IN, TOKENS = 24, 7
BEFORE: dict[str, Callable[[], nn.Module]] = {
    "layer_norm": lambda: nn.LayerNorm(IN),
    "bare layer_norm": lambda: nn.LayerNorm(IN, elementwise_affine=False),
    "layer_norm of two dimensions": lambda: nn.LayerNorm((TOKENS, IN)),
    "gelu": nn.GELU,
    "tanh": lambda: nn.GELU("tanh"),
    "relu": nn.ReLU,
    "nothing": nn.Identity,
    "moved gelu": lambda: nn.Sequential(nn.GELU(), nn.Unflatten(2, (2, 12)), nn.Flatten(2)),
}
ROWS = {
    "all": ((0, 30),),
    "some": ((4, 20),),
    "qkv": ((0, 10), (10, 20), (20, 30)),
    "q and v": ((0, 10), (20, 30)),
    "of two widths": ((0, 10), (12, 30)),
}


def model(before: str, rows: str, dropout: float, rank: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    linear = nn.Linear(IN, 30)
    lora = LoraLinear(linear, LoraSpec(rank, ROWS[rows], IN, scale=0.5, dropout=dropout))
    nn.init.normal_(lora.lora_b)
    return nn.Sequential(nn.Linear(IN, IN), BEFORE[before](), lora, nn.Linear(30, 3))


def run(net: nn.Sequential, x: Tensor, autocast: bool) -> dict[str, Tensor]:
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # of the dropout
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = net(x)
    F.mse_loss(y.float(), torch.ones_like(y, dtype=torch.float32)).backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    found = {"y": y, "x": x.grad, **grads}
    return {
        name: tensor.detach().float().cpu() for name, tensor in found.items() if tensor is not None
    }


def assert_a_card_agrees(net: nn.Sequential, autocast: bool) -> None:
    x = torch.randn(3, TOKENS, IN, generator=torch.Generator().manual_seed(2))
    expected = run(copy.deepcopy(net), x, autocast)
    with pretended_card():
        found = run(net.to("cuda"), x.to("cuda"), autocast)
    assert found.keys() == expected.keys()
    assert {"2.lora_a", "2.lora_b", "0.weight"} <= found.keys()
    eps = torch.finfo(torch.bfloat16 if autocast else torch.float32).eps
    for name, tensor in expected.items():
        close = 8 * eps * float(tensor.abs().max())
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=close, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("before", BEFORE)
def test_whatever_made_the_input(before: str, dropout: float, autocast: bool) -> None:
    assert_a_card_agrees(model(before, "qkv", dropout), autocast)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_whichever_features_it_is_on(rows: str, autocast: bool) -> None:
    assert_a_card_agrees(model("gelu", rows, 0.3), autocast)


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
