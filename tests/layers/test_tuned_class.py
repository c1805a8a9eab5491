"""A tuned layer is what it was: its type, attributes, methods, hooks and place in the model."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d, LayerNorm2d
from torch import Tensor, nn

from spt_kernels import AdapterSpec, LoraSpec, Plan, SparseAdamW, apply, merge, unload
from spt_kernels.layers import (
    LoraLinear,
    SparseDeltaConv2d,
    SparseDeltaLinear,
    SparseDeltaNorm,
    attach_parameter,
    sparse_deltas,
)
from spt_kernels.model import describe
from spt_kernels.optim import param_groups


class Mine(nn.Linear):
    """A Linear with what people add to theirs, some of it under names that tuning uses too."""

    gain = 2.0

    def __init__(self, n_inputs: int, n_outputs: int) -> None:
        super().__init__(n_inputs, n_outputs)
        self.note = ["a", "list"]
        self.inner = nn.Identity()
        self.register_buffer("plain", torch.ones(1))

    def halved(self, x: Tensor) -> Tensor:
        return self(x) / 2

    def update(self) -> str:
        return "my own update"


class Taken(nn.Linear):
    """A Linear whose attributes have the names of a delta and its constants."""

    def __init__(self, n_inputs: int, n_outputs: int) -> None:
        super().__init__(n_inputs, n_outputs)
        self.index = "of its own"

    def delta(self) -> str:
        return "a method"


SPECS = {
    "sparse": None,
    "lora": LoraSpec(2, ((2, 6),), 8, dropout=0.0),
    "adapter": AdapterSpec(2, ((2, 6),)),
}


def tuned(
    make: Callable[[], nn.Module], spec: Any = None, sparse: bool = True
) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": make()})
    plain = copy.deepcopy(model)
    info = describe(model)
    positions = {}
    if sparse or spec is None:
        positions = {
            name: torch.arange(0, 16 if spec and name == "layer.weight" else what.numel, 3)
            for name, what in info.items()
            if name in ("layer.weight", "layer.bias")
        }
    apply(model, Plan(positions, {} if spec is None else {"layer.weight": spec}, info))
    return model, plain


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "alone"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_linear_of_a_class_of_its_own(spec: Any, sparse: bool) -> None:
    model, plain = tuned(lambda: Mine(8, 6), spec, sparse)
    layer: Any = model["layer"]
    assert isinstance(layer, Mine)
    assert isinstance(layer, nn.Linear)
    assert (layer.gain, layer.note, layer.in_features) == (2.0, ["a", "list"], 8)
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer.halved(x), plain["layer"].halved(x))
    assert layer.update() == "my own update"
    assert layer.plain is layer._buffers["plain"]
    layer.note = "another"
    layer.later = 3
    for twin in (copy.deepcopy(layer), _of_class(layer), layer):
        assert torch.equal(twin(x), layer(x))
        assert (twin.note, twin.later, twin.update()) == ("another", 3, "my own update")
        assert list(twin._modules) == ["inner"]
    unload(model)
    assert model["layer"] is layer
    assert type(layer) is Mine
    assert vars(layer).keys() == {*vars(plain["layer"]), "later"}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters()))  # noqa: B905


def _of_class(layer: nn.Module) -> nn.Module:
    """A pickle of it: its class, made at run time, is found by its parts."""
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_names_that_the_layer_has_itself_stay_its_own(spec: Any) -> None:
    model, plain = tuned(lambda: Taken(8, 6), spec)
    layer: Any = model["layer"]
    assert (layer.index, layer.delta()) == ("of its own", "a method")
    x = torch.randn(3, 8)
    layer(x).square().sum().backward()
    plain["layer"](x).square().sum().backward()
    truth = plain["layer"].weight.grad.flatten()[layer.weight_index.long()]
    torch.testing.assert_close(layer.weight_delta.grad, truth)
    optimizer = SparseAdamW(param_groups(model), lr=0.1)
    optimizer.step()
    assert not torch.equal(layer.weight, plain["layer"].weight)
    twin = pickle.loads(pickle.dumps(layer))
    assert torch.equal(twin(x), layer(x))
    assert (layer.index, layer.delta()) == ("of its own", "a method")
    assert type(unload(model)["layer"]) is Taken


LAYERS: dict[str, tuple[Callable[[], nn.Module], type]] = {
    "linear": (lambda: nn.Linear(8, 6), SparseDeltaLinear),
    "conv": (
        lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"),
        SparseDeltaConv2d,
    ),
    "batch_norm": (lambda: nn.BatchNorm2d(6), SparseDeltaNorm),
    "batch_norm_act": (lambda: BatchNormAct2d(6), SparseDeltaNorm),
    "layer_norm": (lambda: nn.LayerNorm(6), SparseDeltaNorm),
    "layer_norm_2d": (lambda: LayerNorm2d(6), SparseDeltaNorm),
    "group_norm": (lambda: nn.GroupNorm(2, 6), SparseDeltaNorm),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_is_of_its_own_type_and_ours(name: str) -> None:
    make, ours = LAYERS[name]
    model, plain = tuned(make)
    layer, kind = model["layer"], type(plain["layer"])
    assert isinstance(layer, kind)
    assert isinstance(layer, ours)
    assert kind.__name__ in type(layer).__name__
    assert repr(plain["layer"]).splitlines()[0].rstrip(")") in repr(layer).replace(
        type(layer).__name__, kind.__name__
    )
    # freezing as people write it
    layer.weight.requires_grad = False
    layer.bias.requires_grad_(False)
    assert isinstance(layer.weight, nn.Parameter)
    for parameter in layer.parameters():
        parameter.requires_grad = False
    assert not any(p.requires_grad for p in model.parameters())
    assert type(merge(model)["layer"]) is kind


def test_hooks_and_references_go_on_through_tuning_and_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    kept, calls = model[0], []
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    info = describe(model)
    apply(
        model, Plan({"0.weight": torch.tensor([1])}, {"0.weight": LoraSpec(1, ((1, 4),), 4)}, info)
    )
    assert kept is model[0]
    assert isinstance(kept, LoraLinear)
    late = kept.register_forward_hook(lambda *_: calls.append("after"))
    model(torch.randn(2, 4))
    assert calls == ["before", "after"]
    merge(model)
    assert kept is model[0]
    model(torch.randn(2, 4))
    assert calls == ["before", "after"] * 2
    late.remove()
    assert type(kept) is nn.Linear
    assert [name for name, _ in model.named_modules()] == ["", "0", "1"]


def test_a_layer_whose_forward_was_replaced_on_the_instance() -> None:
    """As accelerate's hooks do: the sparse delta is found by what that forward reads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    for layer in model:
        layer.forward = (lambda old: lambda x: 2 * old(x))(layer.forward)
    plain, info, x = copy.deepcopy(model), describe(model), torch.randn(5, 4)
    plain[0].forward = lambda x: 2 * nn.Linear.forward(plain[0], x)  # copies share the closure
    plain[1].forward = lambda x: 2 * nn.BatchNorm1d.forward(plain[1], x)
    with pytest.raises(ValueError, match=r"got a Linear with a forward of its own"):
        apply(model, Plan({}, {"0.weight": LoraSpec(1, ((0, 3),), 4)}, info))
    assert [type(layer) for layer in model] == [nn.Linear, nn.BatchNorm1d]
    index = {name: torch.tensor([1]) for name in ("0.weight", "1.weight")}
    apply(model, Plan(index, {}, info))
    (model(x) ** 3).sum().backward()
    (plain(x) ** 3).sum().backward()
    for name, delta in sparse_deltas(model).items():
        truth = plain.get_parameter(name).grad.flatten()[1:2]
        torch.testing.assert_close(delta.delta.grad, truth)


def test_a_failure_half_way_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Mine(8, 6), nn.Linear(6, 2))
    model.to(memory_format=torch.channels_last)
    model[2].lora_b = "of its own"
    model[3].bias.requires_grad_(False)
    before = [vars(module).copy() for module in model]
    positions = {f"{i}.{n}": torch.tensor([1]) for i in range(4) for n in ("weight", "bias")}
    plan = Plan(positions, {"2.weight": LoraSpec(1, ((2, 6),), 8)}, describe(model))
    with pytest.raises(ValueError, match="has an attribute lora_b of its own"):
        apply(model, plan)
    assert [type(module) for module in model] == [nn.Conv2d, nn.BatchNorm2d, Mine, nn.Linear]
    assert [vars(module) for module in model] == before
    assert [p.requires_grad for p in model.parameters()] == [True] * 7 + [False]
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_state_dict_from_when_the_base_layer_was_a_submodule() -> None:
    model, _ = tuned(lambda: nn.Linear(8, 6), SPECS["lora"])
    for parameter in model.parameters():
        nn.init.normal_(parameter) if parameter.requires_grad else None
    x = torch.randn(3, 8)
    expected = model["layer"](x)
    of_base = {"weight", "bias", "delta", "index", "original"}
    of_base |= {f"bias_{n}" for n in ("delta", "index", "original")}
    old = {}
    for key, value in model.state_dict().items():
        local = key.removeprefix("layer.")
        old[f"layer.base.{local}" if local in of_base else key] = value
    other, _ = tuned(lambda: nn.Linear(8, 6), SPECS["lora"])
    other.load_state_dict(old)
    assert torch.equal(other["layer"](x), expected)


@pytest.mark.parametrize("kind", ["delta", "lora", "norm", "attached"])
def test_copies_of_nn_data_parallel_are_refused(kind: str, monkeypatch: Any) -> None:
    replicate: Any = importlib.import_module("torch.nn.parallel.replicate")

    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> Any:
        return [list(tensors) for _ in devices]  # there may be no two cards

    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    model: Any = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    assert len(replicate.replicate(model, [0, 1])) == 2
    if kind == "attached":
        attach_parameter(model[0], "bias", torch.tensor([1]))
    elif kind == "lora":
        model[0] = LoraLinear(model[0], LoraSpec(1, ((0, 3),), 4))
    else:
        name = {"delta": "0.weight", "norm": "1.weight"}[kind]
        apply(model, Plan({name: torch.tensor([1])}, {}, describe(model)))
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel.* use DistributedDataParallel"):
        replicate.replicate(model, [0, 1])


def test_no_subclass_can_be_made_of_a_final_class() -> None:
    class Final(nn.Linear):
        def __init_subclass__(cls) -> None:
            raise TypeError("Final is final")

    model = nn.Sequential(Final(4, 3))
    with pytest.raises(TypeError, match="a Final cannot be tuned: Final is final"):
        apply(model, Plan({"0.weight": torch.tensor([1])}, {}, describe(model)))
    assert type(model[0]) is Final
    assert model[0].weight.requires_grad
