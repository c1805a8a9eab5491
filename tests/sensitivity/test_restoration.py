"""What a forward or a mode leaves in a model is gone before the next forward, and in the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt

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
