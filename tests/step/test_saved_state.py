"""Steps are undone: for the first one to come, or as if there had been none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.layers import sparse_deltas
from spt_kernels.sensitivity import skewed_sensitivity
from spt_kernels.step import TrainingStep
from spt_kernels.step.saved_state import SavedState
from tests.card.on_card import CARD
from tests.card.pretend import pretended_card
from tests.models import tiny_batch, tiny_vit
from tests.quantized import quantize

from . import runs


@pytest.fixture(autouse=True)
def card() -> Iterator[None]:
    with pretended_card():
        yield


def step_of(method: str, make: Any = runs.adamw, **options: Any) -> TrainingStep:
    model = runs.tuned(method, "cuda")
    return TrainingStep(model, F.cross_entropy, make(model), **options)


def everything(step: TrainingStep) -> dict[str, Tensor]:
    values = {name: tensor.cpu() for name, tensor in step.model.state_dict().items()}
    for n, state in enumerate(step.optimizer.state.values()):
        values |= {f"{n}.{name}": value.cpu() for name, value in state.items()}
    values["random"] = torch.get_rng_state()
    return values | {"numpy": torch.tensor(np.random.get_state()[1].astype(np.int64))}  # type: ignore


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def draw() -> None:
    torch.rand(3), random.random(), np.random.rand(700)


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "after-a-step"])
@pytest.mark.parametrize("method", ["spt-lora", "spt-unstructured", "full"])
def test_steps_are_undone(method: str, warm: bool) -> None:
    step, batch = step_of(method), runs.batches(1, "cuda")[0]
    if warm:
        step(*batch)
    grads = {name: p.grad for name, p in step.model.named_parameters()}
    values = {name: None if g is None else g.cpu() for name, g in grads.items()}
    before, state = everything(step), dict(step.optimizer.state)
    saved = SavedState(step, CARD)
    for end in (saved.rewind, saved.restore):
        step(*batch)
        draw()
        end()
        assert all(delta.is_fresh for delta in sparse_deltas(step.model).values())
        after = everything(step)
        if not warm and end == saved.rewind:
            made = {k: v for k, v in after.items() if k not in before}
            assert made  # state, as it is before a first step
            assert not any(value.any() for value in made.values())
            after = {k: v for k, v in after.items() if k in before}
        assert_same(after, before)
    assert dict(step.optimizer.state) == state
    for name, parameter in step.model.named_parameters():
        assert parameter.grad is grads[name], name
        if parameter.grad is not None:
            assert torch.equal(parameter.grad.cpu(), values[name]), name


def test_a_weight_that_was_rounded_otherwise_comes_back_to_the_bit() -> None:
    step, batch = step_of("spt-unstructured"), runs.batches(1, "cuda")[0]
    delta = next(d for d in sparse_deltas(step.model).values() if d.index.numel())
    delta.target.detach().view(-1)[delta.index[0].cpu()] += 2**-20  # as stochastic rounding may
    before = everything(step)
    saved = SavedState(step, CARD)
    step(*batch)
    saved.restore()
    assert_same(everything(step), before)


def test_deltas_beside_quantized_weights_come_back() -> None:
    plain = tiny_vit(depth=1)
    sensitivity = skewed_sensitivity(plain)
    model = spt.apply(quantize(plain), spt.allocate(sensitivity, 400)).train()
    step = TrainingStep(model, F.cross_entropy, spt.SparseAdamW(spt.param_groups(model)))
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    saved = SavedState(step, torch.device("cpu"))
    step(*tiny_batch())
    assert not any(map(torch.equal, trained, before))
    saved.restore()
    assert all(map(torch.equal, trained, before))


def test_a_scaler_comes_back() -> None:
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0, growth_interval=1)
    step, batch = step_of("full", scaler=scaler), runs.batches(1, "cuda")[0]
    saved = SavedState(step, CARD)
    step(*batch)
    assert scaler.get_scale() == 16.0
    scale = scaler._scale
    saved.rewind()
    assert scaler._scale is scale  # where a graph reads it
    assert scaler.get_scale() == 8.0
    saved.restore()
    assert scaler._scale is None
    assert scaler.get_scale() == 8.0


def test_first_values_of_some_optimizers() -> None:
    def nadam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.NAdam(model.parameters(), capturable=True)

    def rprop(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Rprop(model.parameters(), capturable=True)

    batch = runs.batches(1, "cuda")[0]
    for make in (nadam, rprop):
        step = step_of("full", make)
        saved = SavedState(step, CARD)
        step(*batch)
        if make is rprop:
            with pytest.raises(RuntimeError, match=r"first value of .* of Rprop"):
                saved.rewind()
            continue
        saved.rewind()
        for state in step.optimizer.state.values():
            assert float(state.pop("mu_product")) == 1.0
            assert not any(value.any() for value in state.values())
