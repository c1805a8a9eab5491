"""Small models with a LoRA after all that its input may come from, and their gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_kernels.layers import LoraLinear, SparseDeltaNorm
from spt_kernels.plan import LoraSpec

IN, TOKENS = 24, 7


class Part(nn.Module):
    """A part of the channels of what is wider: tokens are apart in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, x.square()), -1)[..., 1 : 1 + IN]


BEFORE: dict[str, Callable[[], nn.Module]] = {
    "layer_norm": lambda: nn.LayerNorm(IN),
    "bare layer_norm": lambda: nn.LayerNorm(IN, elementwise_affine=False),
    "layer_norm of two dimensions": lambda: nn.LayerNorm((TOKENS, IN)),
    "tuned layer_norm": lambda: SparseDeltaNorm(
        nn.LayerNorm(IN), torch.tensor([3, 5]), torch.tensor([0, 23])
    ),
    "gelu": nn.GELU,
    "tanh": lambda: nn.GELU("tanh"),
    "relu": nn.ReLU,
    "nothing": nn.Identity,
    "a part": lambda: Part(),
    "gelu of a part": lambda: nn.Sequential(Part(), nn.GELU()),
    "layer_norm of a part": lambda: nn.Sequential(Part(), nn.LayerNorm(IN)),
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


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], autocast: bool) -> None:
    assert found.keys() == expected.keys()
    assert {"2.lora_a", "2.lora_b", "0.weight"} <= found.keys()
    eps = torch.finfo(torch.bfloat16 if autocast else torch.float32).eps
    for name, tensor in expected.items():
        off = float((found[name] - tensor).abs().max())
        assert off <= 8 * eps * float(tensor.abs().max()), name
