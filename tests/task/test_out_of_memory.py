"""Where memory runs out while a task is merged, the model is as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import spt_kernels as spt


class AtMost(TorchDispatchMode):
    """A memory that has no room for a tensor of more elements."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
        out = func(*args, **(kwargs or {}))
        is_new = isinstance(out, Tensor) and out.untyped_storage()._cdata not in known
        if is_new and out.numel() > self.numel:
            raise torch.OutOfMemoryError(f"there is none for {func}")
        return out


def test_no_lora_is_folded_where_another_has_no_memory() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(32, 4))
    scores = {f"{i}.weight": model[i].weight.detach().abs() for i in range(2)}
    found = spt.allocate(spt.Sensitivity.from_tensors(scores, num_samples=1), 16, rank=1)
    specs = {
        "0.weight": spt.LoraSpec(1, ((0, 8),), 8, 1.0, dropout=0.0),
        "1.weight": spt.LoraSpec(1, ((0, 8), (8, 32)), 8, 1.0, dropout=0.0),
    }
    spt.apply(model, dataclasses.replace(found, unstructured={}, structured=specs, budget=1000))
    x = torch.randn(3, 8)
    with torch.no_grad():
        for layer in model[:2]:
            layer.lora_b.add_(1.0)
        expected, weights = model(x), [layer.weight.clone() for layer in model]
        with pytest.raises(torch.OutOfMemoryError), AtMost(8 * 32 - 1):
            spt.merge(model)
        assert all(torch.equal(layer.weight, w) for layer, w in zip(model, weights, strict=True))
        assert torch.equal(model(x), expected)
        with AtMost(8 * 32):
            spt.merge(model)
        torch.testing.assert_close(model(x), expected)
