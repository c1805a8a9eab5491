"""Methods and recipes: defaults of the paper, what is refused, the course of the learning rate."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from spt_kernels.finetuning.job.recipe import Recipe
from spt_kernels.methods import METHODS, Method
from spt_kernels.segmentation import SegmentationRecipe


def test_the_defaults_are_the_papers() -> None:
    recipe, method = Recipe(), Method()
    assert (recipe.epochs, recipe.batch_size, recipe.weight_decay) == (100, 64, 1e-4)
    assert recipe.peak_lr(method) == 1e-3
    assert (method.name, method.samples, method.dropout) == ("spt-lora", 800, 0.1)
    assert recipe.peak_lr(Method("full")) == 1e-4
    assert Recipe(lr=0.5).peak_lr(Method("full")) == 0.5


def test_the_learning_rate_is_torchs_warm_up_and_cosine() -> None:
    recipe, steps = Recipe(epochs=20, warmup_epochs=4, min_lr_share=0.0), 5
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 21, 1.0, total_iters=20)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=80)
    theirs = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[20])
    for step in range(100):
        expected = optimizer.param_groups[0]["lr"]
        assert recipe.lr_factor(step, steps) == pytest.approx(expected, abs=1e-9), step
        optimizer.step()
        theirs.step()


def test_the_published_schedule_is_timms_stepped_with_the_epoch_that_is_over() -> None:
    recipe, steps = Recipe(schedule="epoch", min_lr_share=0.01), 3
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    theirs = CosineLRScheduler(
        optimizer, t_initial=100, lr_min=1e-5, warmup_t=10, warmup_lr_init=1e-6
    )
    for epoch in range(100):
        expected = optimizer.param_groups[0]["lr"]
        for step in range(epoch * steps, (epoch + 1) * steps):
            assert 1e-3 * recipe.lr_factor(step, steps) == pytest.approx(expected, rel=1e-9), step
        theirs.step(epoch)


def test_the_learning_rate_ends_at_its_floor() -> None:
    recipe = Recipe(epochs=10, min_lr_share=0.01)
    assert recipe.lr_factor(10 * 7, 7) == pytest.approx(0.01)
    assert max(recipe.lr_factor(step, 7) for step in range(70)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"approximate": "gelu-4bit"},
        {"batch_size": -1},
        {"micro_batch": 0},
        {"recompute": "mpl"},
        {"lr": 0.0},
        {"lr": math.nan},
        {"weight_decay": -1.0},
        {"warmup_epochs": 100},
        {"drop_path": 1.0},
        {"clip_grad": 0.0},
        {"amp": "fp8"},
        {"seed": -1},
        {"seed": 2**63},
        {"schedule": "cosine"},
    ],
    ids=str,
)
def test_an_impossible_recipe_is_refused_by_name(change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Recipe(**change)


@pytest.mark.parametrize("name", ["epochs", "batch_size", "val_every", "micro_batch", "seed"])
def test_numbers_that_are_counted_are_whole(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected a whole number, got 2.5"):
        Recipe(**{name: 2.5})


@pytest.mark.parametrize("own", [Recipe(), Method(), SegmentationRecipe()], ids=type)
def test_none_stands_for_nothing_where_there_is_no_such_thing(own: Any) -> None:
    """It went through the checks, and failed somewhere in the run."""
    for f in fields(own):
        if f.name == "name":  # which is refused as any other that there is not
            continue
        if f.default is not None:
            with pytest.raises((TypeError, ValueError), match=f"^{f.name}: expected .* None"):
                replace(own, **{f.name: None})
        else:
            assert getattr(replace(own, **{f.name: None}), f.name) is None


def test_nothing_that_is_said_is_nothing_that_is_not() -> None:
    for said, left_out in (
        (Recipe(recompute="nothing", offload="nothing", approximate="nothing"), Recipe()),
        (SegmentationRecipe(recompute=" nothing "), SegmentationRecipe()),
    ):
        assert said == left_out
    with pytest.raises(ValueError, match=r"^memory_bytes: decides what micro_batch and recompute"):
        Recipe(memory_bytes=2**33, recompute="nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "qlora"}, "method: expected one of"),
        ({"budget": 0}, "budget"),
        ({"budget": -5}, "budget"),
        ({"budget": 0.0}, "budget"),
        ({"name": "linear", "budget": 100}, "has none"),
        ({"name": "full", "rank": 4}, "has none"),
        ({"rank": 0}, "rank"),
        ({"samples": 0}, "samples"),
        ({"dropout": 1.0}, "dropout"),
        ({"rule": "own"}, "rule"),
    ],
    ids=str,
)
def test_an_impossible_method_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Method(**change)


def test_every_method_can_be_named() -> None:
    names = [name.replace("-K", "-4") for name in METHODS]
    assert [Method(name).name for name in names] == names
