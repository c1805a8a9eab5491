"""Deltas of a BatchNorm that is converted to a SyncBatchNorm after it was tuned."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import nn

from spt_kernels import Plan, apply, unload
from spt_kernels.layers import SparseDeltaNorm, delta_of, sparse_deltas
from spt_kernels.layers.deltas.sparse_delta import owner_of
from spt_kernels.model import describe


def model_of(norm: Callable[[int], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4)).eval()


@pytest.mark.parametrize("duplicate", [lambda m: m, copy.deepcopy], ids=["itself", "copy"])
@pytest.mark.parametrize(
    ("norm", "convert"),
    [
        (nn.BatchNorm2d, nn.SyncBatchNorm.convert_sync_batchnorm),
        (BatchNormAct2d, convert_sync_batchnorm),
    ],
    ids=["torch", "timm"],
)
def test_what_was_tuned_stays_tuned(
    norm: Callable[[int], nn.Module], convert: Callable[[nn.Module], nn.Module], duplicate: Callable
) -> None:
    model = model_of(norm)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    index = {f"1.{n}": torch.tensor([0, 2]) for n in ("weight", "bias")}
    apply(model, Plan(index, {}, describe(model)))
    model = duplicate(model)
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    names = [name for name, _ in model.named_parameters()]
    model = convert(model)
    gc.collect()
    assert isinstance(model[1], nn.SyncBatchNorm)
    assert isinstance(model[1], SparseDeltaNorm)
    assert {name for name, _ in model.named_parameters()} == set(names)
    assert torch.equal(model(x), expected)
    deltas = sparse_deltas(model)
    assert deltas.keys() == index.keys()
    optimizer = torch.optim.SGD([d.delta for d in deltas.values()], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    for name, delta in deltas.items():
        assert delta_of(delta.delta).target is delta.target
        assert not torch.equal(delta.target, before[name])
        assert torch.equal(delta.target[[1, 3]], before[name][[1, 3]])
    unload(model)
    assert isinstance(model[1], nn.SyncBatchNorm)
    assert not isinstance(model[1], SparseDeltaNorm)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_plain_conversion_stays_plain() -> None:
    model = model_of(nn.BatchNorm2d)
    apply(model, Plan({"1.weight": torch.tensor([0])}, {}, describe(model)))
    unload(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[1]) is nn.SyncBatchNorm
    assert all(owner_of(parameter) is None for parameter in model.parameters())
