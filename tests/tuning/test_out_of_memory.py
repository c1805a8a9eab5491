"""Where memory runs out while a model is tuned, it is plain as it was."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import spt_kernels as spt
from tests.short_memory import allocations, running_out

NAMES = ("0.weight", "0.bias", "1.weight", "1.bias")


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 5))


def plan(structured: str | None) -> spt.Plan:
    scores = {n: p.detach().abs() + 1 for n, p in small().named_parameters() if n in NAMES}
    found = spt.allocate(spt.Sensitivity.from_tensors(scores, num_samples=1), 24, None)
    entries = {name: torch.arange(0, scores[name].numel(), 3) for name in NAMES}
    specs: dict[str, spt.LoraSpec | spt.AdapterSpec] = {
        "lora": spt.LoraSpec(2, ((0, 8),), 8, 1.0, dropout=0.0),
        "adapter": spt.AdapterSpec(2, ((0, 8),)),
    }
    if structured is None:
        return dataclasses.replace(found, unstructured=entries, budget=1000)
    del entries["0.weight"]
    on_matrix = {"0.weight": specs[structured]}
    return dataclasses.replace(
        found, unstructured=entries, structured=on_matrix, budget=1000, kind=structured
    )


@pytest.mark.parametrize("structured", ["lora", "adapter", None])
def test_a_plan_is_applied_or_it_is_not(structured: str | None) -> None:
    found, model, before, other = plan(structured), small(), small(), small()
    spt.apply(small(), found)  # from then on some things are known
    count = allocations(lambda: spt.apply(other, found))
    for refused in range(count):
        with running_out(range(refused, 9 * count)):
            spt.apply(model, found)
        assert [type(module) for module in model] == [type(module) for module in before]
        assert [vars(module).keys() for module in model] == [vars(m).keys() for m in before]
        assert model.state_dict().keys() == before.state_dict().keys()
        assert all(p.requires_grad for p in model.parameters())
    spt.apply(model, found)
    images = torch.randn(3, 8)
    assert torch.equal(model(images), before(images))
