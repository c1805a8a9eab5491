"""What a forward or a mode leaves in a model is gone before the next forward, and in the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt
from spt_kernels.sensitivity.per_sample import autograd, watched

from .per_sample_truth import assert_exact

BATCHES = [
    (torch.randn(n, 6, generator=torch.Generator().manual_seed(n)), torch.arange(n)) for n in (3, 1)
]


def measure(model: nn.Module, loss_fn: Any = F.cross_entropy) -> spt.Sensitivity:
    return spt.measure_sensitivity(model, BATCHES, loss_fn, include=["*"], head=(), progress=False)


class Keeps(nn.Module):
    """Makes a gain of a parameter once, and keeps that, and what it has seen."""

    def __init__(self, where: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.top = nn.Linear(6, 7), nn.Linear(7, 5)
        self.log_gain = nn.Parameter(torch.randn(7))
        self.where = where
        self._cache: dict[str, Tensor] = {}
        self.kept: Tensor | None = None
        self.register_buffer("buffer", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).tanh()
        self.seen, self.all_seen = x, [x]
        return self.top(x * self.gain())

    def gain(self) -> Tensor:
        if self.where == "nowhere":
            return self.log_gain.exp()
        if self.where == "dictionary":
            if "gain" not in self._cache:
                self._cache["gain"] = self.log_gain.exp()
            return self._cache["gain"]
        if getattr(self, self.where) is None:
            setattr(self, self.where, self.log_gain.exp())
        return getattr(self, self.where)


@pytest.mark.parametrize("where", ["kept", "buffer", "dictionary"])
def test_what_a_forward_keeps_is_forgotten(where: str) -> None:
    model = Keeps(where)
    before = dict(vars(model))
    sensitivity = measure(model)
    assert vars(model) == before
    assert not model._cache
    assert model.buffer is None
    assert not sensitivity.fallback
    assert not sensitivity.idle
    assert_exact(sensitivity, Keeps("nowhere"), BATCHES)


class Folds(nn.Linear):
    """Adds to its weight in eval mode, as a LoRA that is merged for inference does."""

    is_folded = False

    def train(self, mode: bool = True) -> Folds:
        if mode == self.is_folded:
            self.weight.data += -1 if mode else 1
            self.is_folded = not mode
        self.requires_grad_(True)
        return super().train(mode)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("within", [True, False])
def test_a_layer_that_another_mode_changes_is_as_in_its_own(training: bool, within: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Folds(6, 8), nn.Linear(8, 5)).train(training)
    model[0].train(within)
    model[0].bias.requires_grad_(False)
    measure(model)
    assert (model.training, model[0].training) == (training, within)
    assert model[0].is_folded is not within
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]


def test_a_loss_with_parameters_of_its_own_gets_no_gradients() -> None:
    class Angles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classes = nn.Parameter(torch.randn(5, 5))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output @ self.classes, target)

    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)), Angles()
    assert_exact(measure(model, loss_fn), model, BATCHES, loss_fn)
    assert loss_fn.classes.requires_grad
    assert loss_fn.classes.grad is None


@pytest.mark.parametrize("module", [watched, autograd])
def test_ctrl_c_while_parameters_are_put_back(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(states: Any) -> None:
        states[0].restore()
        raise KeyboardInterrupt

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Bilinear(7, 7, 7), nn.Linear(7, 5))
    model[1].forward = lambda x: nn.Bilinear.forward(model[1], x, x)  # takes a pass of its own
    model[0].bias.requires_grad_(False)
    gradient = model[1].weight.grad = torch.ones(7, 7, 7)
    monkeypatch.setattr(module, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(model)
    monkeypatch.undo()
    for name, parameter in model.named_parameters():
        assert type(parameter) is nn.Parameter
        assert not vars(parameter)
        assert parameter.requires_grad == (name != "0.bias")
        assert parameter.grad is (gradient if name == "1.weight" else None)
        assert parameter._backward_hooks is None
    F.cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).backward()
    assert not torch.equal(model[1].weight.grad, torch.ones(7, 7, 7))
