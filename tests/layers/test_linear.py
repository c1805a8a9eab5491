"""The sparse Linear as a module: what it refuses, how it is moved, copied, pickled and loaded."""

from __future__ import annotations

import copy
import importlib
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spt_kernels.layers import SparseDeltaLinear, delta_of

from .truth import BIAS_INDEX, INDEX, sparse_linear, tokens


def test_is_the_plain_layer_at_first() -> None:
    linear = nn.Linear(8, 6)
    layer = SparseDeltaLinear(linear, INDEX.int(), BIAS_INDEX)
    x = tokens(3, 8)
    assert torch.equal(layer(x), linear(x))
    assert layer.weight is linear.weight
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    assert layer.delta.dtype == torch.float32
    assert layer.index.dtype == torch.int32
    assert (layer.in_features, layer.out_features) == (8, 6)
    assert type(layer.plain) is nn.Linear
    assert layer.plain.state_dict().keys() == linear.state_dict().keys()
    assert repr(layer) == (
        "SparseDeltaLinear(in_features=8, out_features=6, bias=True, nnz=19, bias_nnz=2)"
    )


def test_without_bias_and_with_nothing_trained() -> None:
    layer = SparseDeltaLinear(nn.Linear(8, 6, bias=False), torch.empty(0, dtype=torch.int64))
    x = tokens(3, 8)
    y = layer(x)
    assert layer.bias is None
    y.sum().backward()
    assert x.grad is not None
    assert layer.delta.grad is None


def test_bias_alone() -> None:
    layer = SparseDeltaLinear(nn.Linear(8, 6), torch.empty(0, dtype=torch.int32), BIAS_INDEX)
    y = layer(tokens(3, 8))
    assert y.grad_fn.saved_input is None
    y.sum().backward()
    assert layer.bias_delta.grad.tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([0, 1], TypeError, "index must be a tensor, got list"),
        (torch.tensor([0.0, 1.0]), TypeError, "index must be int32 or int64, got torch.float32"),
        (torch.tensor([True, False]), TypeError, "index must be int32 or int64, got torch.bool"),
        (torch.tensor([0, 1], dtype=torch.int16), TypeError, "got torch.int16"),
        (torch.tensor([[0], [1]]), ValueError, r"index must be a vector, got shape \(2, 1\)"),
        (torch.tensor([3, 1]), ValueError, "sorted"),
        (torch.tensor([1, 3, 3]), ValueError, "repeat a position, got 3"),
        (torch.tensor([-1, 3]), ValueError, r"must lie in \[0, 48\), got -1 to 3"),
        (torch.tensor([1, 48]), ValueError, r"must lie in \[0, 48\), got 1 to 48"),
        (torch.tensor([1, 2**33]), ValueError, r"must lie in \[0, 48\)"),
        (torch.tensor([1], device="meta"), ValueError, "index must be on cpu like weight"),
    ],
    ids=[
        *("list", "float", "bool", "int16", "matrix", "unsorted", "repeated", "negative"),
        *("too_large", "beyond_int32", "device"),
    ],
)
def test_refuses_an_index(index: object, error: type[Exception], message: str) -> None:
    linear = nn.Linear(8, 6)
    with pytest.raises(error, match=message):
        SparseDeltaLinear(linear, index)  # type: ignore[arg-type]
    with pytest.raises(error):
        SparseDeltaLinear(linear, INDEX, index)  # type: ignore[arg-type]
    assert linear.weight.requires_grad, "a refused layer must be left as it was"


def test_refuses_other_modules_and_weights() -> None:
    with pytest.raises(TypeError, match=r"linear must be an nn.Linear, got Conv2d"):
        SparseDeltaLinear(nn.Conv2d(1, 1, 1), INDEX)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no bias"):
        SparseDeltaLinear(nn.Linear(8, 6, bias=False), INDEX, BIAS_INDEX)
    strided = nn.Linear(8, 6)
    strided.weight = nn.Parameter(torch.randn(8, 6).t())
    with pytest.raises(ValueError, match="weight must be contiguous"):
        SparseDeltaLinear(strided, INDEX)
    whole = nn.Linear(8, 6)
    whole.weight = nn.Parameter(torch.ones(6, 8, dtype=torch.int64), requires_grad=False)
    with pytest.raises(TypeError, match="weight must be floating"):
        SparseDeltaLinear(whole, INDEX)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_deltas_stay_fp32_when_the_model_is_cast(dtype: torch.dtype) -> None:
    layer = sparse_linear()
    deltas = layer.delta.detach().clone()
    base = layer.plain.weight.detach().clone()
    base.view(-1)[INDEX] = layer.original
    layer.delta.grad = torch.ones_like(layer.delta)
    parameter = layer.delta

    layer.to(dtype)

    assert layer.delta is parameter
    assert layer.delta.dtype == torch.float32
    assert layer.delta.grad.dtype == torch.float32
    assert torch.equal(layer.delta, deltas)
    assert layer.original.dtype == dtype
    assert torch.equal(layer.original, base.to(dtype).view(-1)[INDEX])
    expected = base.to(dtype)
    expected.view(-1)[INDEX] = (layer.original.double() + deltas.double()).to(dtype)
    assert torch.equal(layer.weight, expected)
    assert delta_of(layer.delta).target is layer.weight
    assert layer.plain.weight is layer.weight


def test_half_bfloat16_and_an_outer_module() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), sparse_linear())
    model.half()
    assert model[2].delta.dtype == torch.float32
    assert model[2].weight.dtype == torch.float16
    model.bfloat16()
    model(tokens(3, 8, dtype=torch.bfloat16)).sum().backward()
    assert model[2].delta.grad.dtype == torch.float32


def test_meta_device() -> None:
    layer = sparse_linear().to("meta")
    assert layer.weight.is_meta
    assert layer.delta.is_meta
    x = torch.empty(3, 8, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.is_meta
    assert layer.delta.grad.is_meta
    assert layer.delta.grad.shape == layer.delta.shape
    with torch.device("meta"), pytest.raises(ValueError, match="index is on the meta device"):
        SparseDeltaLinear(nn.Linear(8, 6), torch.arange(3))


@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assigned"])
def test_an_empty_delta_comes_back_from_the_meta_device(assign: bool) -> None:
    torch.manual_seed(0)
    nothing = torch.empty(0, dtype=torch.int64)
    layer = SparseDeltaLinear(nn.Linear(8, 6), nothing, BIAS_INDEX)
    x, state = tokens(3, 8), {n: t.clone() for n, t in layer.state_dict().items()}
    expected = layer(x)
    layer.to("meta")
    if not assign:
        layer.to_empty(device="cpu")
    layer.load_state_dict(state, assign=assign)
    assert torch.equal(layer(x), expected)
    for held in (layer.delta, layer.index, layer.original):
        assert (held.shape, held.device.type) == ((0,), "cpu")
    layer(x).sum().backward()
    assert layer.bias_delta.grad is not None


@pytest.mark.parametrize("swap", [False, True], ids=["set_data", "swap_tensors"])
def test_tags_survive_either_way_of_converting(swap: bool) -> None:
    layer = sparse_linear()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        layer.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert delta_of(layer.delta) is not None
    assert layer.delta.dtype == torch.float32


def _pickled(layer: SparseDeltaLinear) -> SparseDeltaLinear:
    return pickle.loads(pickle.dumps(layer))


def _saved(layer: SparseDeltaLinear) -> SparseDeltaLinear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved])
def test_copies_are_whole_and_apart(duplicate) -> None:  # type: ignore[no-untyped-def]
    layer = sparse_linear()
    twin = duplicate(layer)
    x = tokens(3, 8)
    assert torch.equal(twin(x), layer(x))
    assert delta_of(twin.delta).target is twin.weight
    assert twin.plain.weight is twin.weight
    assert delta_of(layer.delta).target is layer.weight
    with torch.no_grad():
        twin.delta.add_(1.0)
    assert not torch.equal(twin(x), layer(x))
    twin(F.gelu(x)).sum().backward()
    assert layer.delta.grad is None


def test_a_copy_of_a_stale_layer_is_stale_too() -> None:
    layer = sparse_linear()
    with torch.no_grad():
        layer.delta.fill_(2.0)
    twin = copy.deepcopy(layer)
    twin(tokens(3, 8))
    assert torch.equal(twin.weight.view(-1)[INDEX], twin.original + 2.0)


def test_a_delta_can_be_pickled_alone() -> None:
    file = io.BytesIO()
    torch.save(sparse_linear().delta, file)
    file.seek(0)
    assert delta_of(torch.load(file, weights_only=True)) is None


def test_state_dict_round_trip() -> None:
    layer, other = sparse_linear(seed=1), sparse_linear(seed=2)
    assert set(layer.state_dict()) == {
        *("weight", "bias", "delta", "index", "original"),
        *("bias_delta", "bias_index", "bias_original"),
    }
    other.load_state_dict(layer.state_dict())
    x = tokens(3, 8)
    assert torch.equal(other(x), layer(x))
    other.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    assert delta_of(other.delta).target is other.weight
    assert other.plain.weight is other.weight


def test_blocks_of_the_dense_product_follow_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pattern carries for a dense mask is made anew with the positions, and copied."""
    op = importlib.import_module("spt_kernels.ops.sparse_weight_grad")
    monkeypatch.setattr(op, "_dense_is_cheaper", lambda *_: True)
    layer, other = (SparseDeltaLinear(nn.Linear(8, 6), index) for index in (INDEX, INDEX + 1))
    layer.load_state_dict(other.state_dict())
    x = tokens(4, 8)
    for model in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert model.__dict__["_spt_pattern"].whole._plan
        y = model(x)
        y.backward(torch.ones_like(y))
        whole = torch.ones_like(y).flatten(0, -2).T @ x.flatten(0, -2)
        torch.testing.assert_close(model.delta.grad, whole.flatten()[INDEX + 1])


def test_state_dict_of_another_index() -> None:
    torch.manual_seed(0)
    layer = SparseDeltaLinear(nn.Linear(8, 6), INDEX + 1)
    other = sparse_linear()
    other = SparseDeltaLinear(nn.Linear(8, 6), INDEX)
    other.load_state_dict(layer.state_dict())
    x = tokens(4, 8)
    other(x).square().sum().backward()
    layer(x).square().sum().backward()
    assert torch.equal(other.delta.grad, layer.delta.grad)


def test_state_dict_with_a_bad_index_is_refused_before_it_is_loaded() -> None:
    layer = sparse_linear()
    before = copy.deepcopy(layer.state_dict())
    bad = copy.deepcopy(before)
    bad["index"][-1] = 48
    bad["delta"] += 1
    with pytest.raises(RuntimeError, match=r"index must lie in \[0, 48\)"):
        layer.load_state_dict(bad)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_plain_base_weights_loaded_into_a_tuned_layer() -> None:
    layer = sparse_linear()
    base = nn.Linear(8, 6)
    layer.load_state_dict(base.state_dict(), strict=False)
    assert torch.equal(layer.original, base.weight.view(-1)[INDEX])
    expected = base.weight.detach().clone()
    expected.view(-1)[INDEX] += layer.delta
    assert torch.equal(layer.weight, expected)


def test_stochastically_rounded_weights_survive_a_state_dict() -> None:
    layer = sparse_linear().bfloat16()
    with torch.no_grad():  # one unit in the last place away from the nearest
        one_up = torch.nextafter(layer.weight.view(-1)[INDEX], torch.tensor(9.0).bfloat16())
        layer.weight.view(-1)[INDEX] = one_up
    error = (one_up.double() - layer.original.double() - layer.delta.double()).abs()
    near = error <= torch.finfo(torch.bfloat16).eps * one_up.double().abs() / 2
    other = sparse_linear(seed=9).bfloat16()
    other.load_state_dict(layer.state_dict())
    other(tokens(2, 8, dtype=torch.bfloat16))
    if bool(near.all()):
        assert torch.equal(other.weight, layer.weight)
