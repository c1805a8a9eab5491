"""Selective checkpointing keeps outputs of products themselves, into which no layer may write."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from spt_kernels.layers import (
    AdapterLinear,
    LoraConv2d,
    LoraLinear,
    QuantizedDeltaLinear,
    QuantizedLoraLinear,
    SparseDeltaLinear,
)
from spt_kernels.plan import AdapterSpec, LoraSpec
from tests.quantized import quantized

INDEX = torch.arange(0, 48, 5)
DROPPED = LoraSpec(2, ((0, 6),), 8, 0.5, 0.3)
PARTED = LoraSpec(2, ((0, 2), (4, 6)), 8, 0.5, 0.0)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "delta": lambda: SparseDeltaLinear(nn.Linear(8, 6), INDEX),
    "lora": lambda: LoraLinear(nn.Linear(8, 6), DROPPED),
    "lora without bias": lambda: LoraLinear(nn.Linear(8, 6, bias=False), PARTED),
    "lora on a delta": lambda: LoraLinear(SparseDeltaLinear(nn.Linear(8, 6), INDEX), PARTED),
    "adapter": lambda: AdapterLinear(nn.Linear(8, 6), AdapterSpec(2, ((0, 6),))),
    "convolution": lambda: LoraConv2d(nn.Conv2d(8, 6, 1), DROPPED),
    "quantized": lambda: QuantizedLoraLinear(quantized(nn.Linear(8, 6)), DROPPED),
    "quantized delta": lambda: QuantizedDeltaLinear(quantized(nn.Linear(8, 6)), INDEX),
}
KEPT = ("mm", "addmm", "bmm", "baddbmm", "convolution")


def keeps_products(_: Any, op: Any, *args: Any, **named: Any) -> CheckpointPolicy:
    is_product = op.overloadpacket.__name__ in KEPT
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("may_mutate", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_without(name: str, may_mutate: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(LAYERS[name](), nn.GELU())
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    x = torch.randn((2, 8, 3, 3) if name == "convolution" else (5, 8))
    contexts = partial(
        create_selective_checkpoint_contexts, keeps_products, allow_cache_entry_mutation=may_mutate
    )

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        given = x.clone().requires_grad_()
        inputs = [given, *(p for p in module.parameters() if p.requires_grad)]
        return [*torch.autograd.grad(run(given).square().sum(), inputs)]

    found = gradients(lambda x: checkpoint(module, x, use_reentrant=False, context_fn=contexts))
    for got, expected in zip(found, gradients(module), strict=True):
        torch.testing.assert_close(got, expected)
