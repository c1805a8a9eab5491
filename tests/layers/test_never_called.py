"""Tests for what is told of a tuned layer that the model does not call."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spt_kernels import apply, unload
from spt_kernels.layers import SparseDeltaLinear
from spt_kernels.model import describe
from spt_kernels.plan import LoraSpec, Plan

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def steps(model: Any, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(tokens(3, 8)).sum().backward()
        optimizer.step()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


class Bypasses(nn.Module):
    """Reads the weight and never calls the layer, as some attention blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.linear(x, self.inner.weight))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["sparse", "lora"])
def test_a_layer_that_is_read_and_never_called_is_an_error_at_the_second_step(
    kind: str, compiled: bool
) -> None:
    if compiled and TORCH <= (2, 11):
        pytest.skip("the compiler of torch 2.11 reads a parameter past its property")
    model = Bypasses()
    spec = {"inner.weight": LoraSpec(2, ((0, 6),), 8)} if kind == "lora" else {}
    index = {"inner.weight": torch.arange(4)} if kind == "sparse" else {}
    apply(model, Plan(index, spec, describe(model), head=("head.weight", "head.bias")))
    optimizer = optimizer_of(model)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    steps(run, optimizer, 1)
    with pytest.raises(RuntimeError, match="inner is tuned, but the model never calls it"):
        steps(run, optimizer, 1)
    optimizer.zero_grad()
    optimizer.step()  # without a backward there is nothing to be noticed


def test_a_layer_without_a_name_that_is_read_is_an_error() -> None:
    model = Bypasses()
    model.inner = SparseDeltaLinear(model.inner, torch.arange(4))
    optimizer = torch.optim.SGD([*model.head.parameters(), model.inner.delta], lr=0.1)
    with pytest.raises(RuntimeError, match="SparseDeltaLinear is tuned, but the model never"):
        steps(model, optimizer, 2)


class Routed(nn.Module):
    """Of layers by name one is called, as of experts or of the towers of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)
        self.way = "a"

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(getattr(self, self.way)(x))
        return y


def routed() -> Routed:
    model = Routed()
    index = {f"{name}.weight": torch.arange(4) for name in "abc"}
    apply(model, Plan(index, {}, describe(model), head=("head.weight", "head.bias")))
    return model


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_layer_that_many_batches_pass_by_trains_once_one_comes_to_it(compiled: bool) -> None:
    model = routed()
    classes = [type(model.get_submodule(name)) for name in "abc"]
    optimizer = optimizer_of(model)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    for model.way in "aabbccabc":
        steps(run, optimizer, 1)
        # whoever looks at a weight does not use it
        assert all(model.get_submodule(name).weight.norm() > 0 for name in "abc")
    for name, kind in zip("abc", classes, strict=True):
        layer: Any = model.get_submodule(name)
        delta = next(iter(layer.sparse_deltas().values()))
        assert delta.delta.abs().sum() > 0
        assert compiled or type(layer) is kind


def test_a_model_with_layers_that_were_passed_by_is_copied_pickled_and_unloaded() -> None:
    model = routed()
    plain = Routed().state_dict().keys()
    steps(model, optimizer_of(model), 1)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for model.way in "abc":
            twin.way = model.way
            assert torch.equal(twin(tokens(3, 8)), model(tokens(3, 8)))
        model.way = "a"
    steps(model, optimizer_of(model), 1)
    unload(model)
    assert type(model.b) is nn.Linear
    assert type(model.c) is nn.LayerNorm
    assert model.state_dict().keys() == plain


class Dropping(nn.Module):
    """Layers of which every batch passes some by, as LayerDrop and mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.read = nn.Linear(8, 2)
        self.kept: tuple[int, ...] = (0, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        for n in self.kept:
            x = self.layers[n](x)
        return nn.functional.linear(x, self.read.weight, self.read.bias)


def test_a_layer_that_the_first_batches_pass_by_trains_when_one_comes_to_it() -> None:
    model = Dropping()
    index = {f"layers.{n}.weight": torch.arange(4) for n in range(3)}
    apply(model, Plan(index, {}, describe(model), head=("read.weight", "read.bias")))
    optimizer = optimizer_of(model)
    for model.kept in ((0,), (0, 1), (0, 2)):
        steps(model, optimizer, 1)
    assert all(layer.delta.abs().sum() > 0 for layer in model.layers)


def test_a_layer_that_is_read_in_every_block_is_an_error_though_others_are_called() -> None:
    model = Dropping()
    names = ("layers.0.weight", "layers.1.weight", "layers.2.weight", "read.weight")
    index = {name: torch.arange(4) for name in names}
    apply(model, Plan(index, {}, describe(model), head=("read.bias",)))
    with pytest.raises(RuntimeError, match="read is tuned, but the model never calls it"):
        steps(model, optimizer_of(model), 2)
