"""Averages of a tuned model: positions and base values are constants that no average may touch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from spt_kernels import apply, unload
from spt_kernels.layers import SparseDeltaLinear, attach_parameter, sparse_deltas
from tests.models import tiny_batch, tiny_vit
from tests.tuning.test_tuning import unstructured

DECAY = 0.9
Average = tuple[Callable[[nn.Module], object], Callable[[], nn.Module]]


def averaged(model: nn.Module) -> Average:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    average.update_parameters(model)  # the first one only copies
    return average.update_parameters, lambda: average.module


def timm_v1(model: nn.Module) -> Average:
    average = ModelEma(model, decay=DECAY)
    return average.update, lambda: average.ema


def timm_v2(model: nn.Module) -> Average:
    average = ModelEmaV2(model, decay=DECAY)
    return average.update, lambda: average.module


def timm_v3(model: nn.Module) -> Average:
    average = ModelEmaV3(model, decay=DECAY)
    return average.update, lambda: average.module


@pytest.mark.parametrize("make", [averaged, timm_v1, timm_v2, timm_v3])
def test_an_average_has_the_same_positions_and_averaged_deltas(
    make: Callable[[nn.Module], Average],
) -> None:
    model = tiny_vit()
    apply(model, unstructured(model))
    start = {name: d.original.clone() for name, d in sparse_deltas(model).items()}
    update, module = make(model)
    images, labels = tiny_batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    expected = {name: d.delta.detach().clone() for name, d in sparse_deltas(model).items()}
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        update(model)
        for name, delta in sparse_deltas(model).items():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * delta.delta.detach()
    average = module()
    output = average(images)
    assert output.isfinite().all()
    trained = sparse_deltas(model)
    for name, delta in sparse_deltas(average).items():
        assert torch.equal(delta.index, trained[name].index), name
        assert torch.equal(delta.original, start[name]), name
        torch.testing.assert_close(delta.delta.detach(), expected[name], rtol=1e-4, atol=1e-7)
        held = delta.target.view(-1)[delta.index.long()]
        assert torch.equal(held, delta.original + delta.delta), name
    unload(average)
    plain = dict(average.named_parameters())
    for name, delta in trained.items():
        assert torch.equal(plain[name].view(-1)[delta.index.long()], start[name]), name


def attached_table() -> nn.Module:
    model = nn.Embedding(30, 40)
    attach_parameter(model, "weight", torch.arange(0, 1200, 7))
    return model


@pytest.mark.parametrize(
    "make",
    [lambda: SparseDeltaLinear(nn.Linear(40, 30), torch.arange(0, 1200, 7)), attached_table],
    ids=["linear", "in_place"],
)
def test_writes_into_buffers_or_a_state_dict_reach_no_position(
    make: Callable[[], nn.Module],
) -> None:
    model = make()
    (delta,) = sparse_deltas(model).values()
    index, original = delta.index.clone(), delta.original.clone()
    for tensor in (*model.buffers(), *model.state_dict().values()):
        tensor.detach().zero_()
    (delta,) = sparse_deltas(model).values()
    assert torch.equal(delta.index, index)
    assert torch.equal(delta.original, original)


def test_constants_move_with_the_model() -> None:
    layer = SparseDeltaLinear(nn.Linear(8, 6), torch.tensor([3, 9]), torch.tensor([2]))
    layer.to(torch.bfloat16)
    assert layer.original.dtype == layer.bias_original.dtype == torch.bfloat16
    layer.type(torch.float16)  # casts integers as well
    assert layer.index.dtype == layer.bias_index.dtype == torch.int32
    assert layer.index.tolist() == [3, 9]
    meta = layer.to("meta")
    assert meta.index.is_meta
    assert meta.original.is_meta
    meta.to_empty(device="cpu")  # whatever lies in memory there is no position
    assert meta.index.tolist() == [0, 1]


def test_a_name_that_is_taken() -> None:
    model = nn.Embedding(3, 4)
    model.weight_index = "of its own"
    with pytest.raises(ValueError, match="attribute weight_index of its own"):
        attach_parameter(model, "weight", torch.tensor([1]))
    assert model.weight_index == "of its own"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("index", torch.tensor([0, 1]), r"index must be \[3\], got \[2\]"),
        ("index", torch.tensor([0.2, 0.4, 0.6]), "index must be int32 or int64, got torch.float32"),
        ("original", torch.zeros(2), r"original must be \[3\], got \[2\]"),
    ],
)
def test_constants_of_another_form_are_refused(
    name: str, value: torch.Tensor, message: str
) -> None:
    layer = SparseDeltaLinear(nn.Linear(8, 6), torch.tensor([1, 3, 9]))
    state = {**layer.state_dict(), name: value}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert layer.index.tolist() == [1, 3, 9]


def test_a_state_dict_without_the_constants_is_incomplete() -> None:
    layer = SparseDeltaLinear(nn.Linear(8, 6), torch.tensor([1, 3, 9]))
    state = layer.state_dict()
    del state["index"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"index\""):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"other\""):
        layer.load_state_dict({**layer.state_dict(), "other": torch.ones(1)})


def test_a_copy_in_another_dtype() -> None:
    layer = SparseDeltaLinear(nn.Linear(8, 6), torch.tensor([1, 3, 9]))
    memo = {id(layer.weight): nn.Parameter(layer.weight.detach().bfloat16(), requires_grad=False)}
    twin = copy.deepcopy(layer, memo)
    assert twin.original.dtype == torch.bfloat16
    (delta,) = twin.sparse_deltas().values()
    delta.write()
    assert torch.equal(twin.weight, layer.weight.bfloat16())
