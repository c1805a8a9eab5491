"""The head that a method is told of is what it trains besides, whatever its name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.memory import estimate_memory
from spt_kernels.methods import Method, make_plan, tune
from spt_kernels.sensitivity import skewed_sensitivity
from tests.models import tiny_vit

from .every import NAMES, method

HEAD = 24 * 5 + 5


class Wrapped(nn.Module):
    """A ViT in blocks, and a classifier that no name tells of."""

    def __init__(self) -> None:
        super().__init__()
        vit = tiny_vit(num_classes=0)
        self.blocks, self.norm, self.embed_dim, self.num_prefix_tokens = vit.blocks, vit.norm, 24, 1
        self.score = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.norm(self.blocks(x))[:, 0])


@pytest.mark.parametrize("name", NAMES)
def test_every_method_trains_all_of_it(name: str) -> None:
    model = Wrapped()
    told = replace(method(name), head="score")
    scores = skewed_sensitivity(model, head="score") if told.is_sensitivity_aware else None
    tunable = tune(model, told, make_plan(model, told, scores))
    trained = {n: p.numel() for n, p in tunable.model.named_parameters() if p.requires_grad}
    in_head = sum(n for name, n in trained.items() if "score" in name and "hidden" not in name)
    assert in_head == HEAD == tunable.in_head


@pytest.mark.parametrize("name", ["peft-lora-all", "peft-shira", "peft-super-tuning"])
def test_what_is_in_a_head_takes_nothing_of_the_budget(name: str) -> None:
    chosen = replace(method(name), head="blocks.1.mlp.fc2")
    made = tune(tiny_vit(), chosen, None)
    assert chosen.budget is not None
    ours = made.trained / int(chosen.budget)
    without = tune(tiny_vit(), method(name), None).trained / int(chosen.budget)
    assert 1 >= ours >= min(without, 0.99)


def test_a_sensitivity_of_another_head_is_refused() -> None:
    model = Wrapped()
    scores = skewed_sensitivity(model, head="score")
    with pytest.raises(ValueError, match=r"head: 'norm' is not the head .* score\.weight"):
        make_plan(model, Method("spt-lora", 100, head="norm"), scores)
    plan = make_plan(model, Method("spt-lora", 100), scores)
    assert plan is not None
    assert plan.head == ("score.weight", "score.bias")


def test_names_go_for_a_head_where_nobody_has_said() -> None:
    plan = make_plan(tiny_vit(), Method("linear"))
    assert plan is not None
    assert (plan.head, plan.head_source) == (("head.weight", "head.bias"), "names")


def test_no_head_is_no_head() -> None:
    tunable = spt.methods["bias"](tiny_vit(), head="none")
    assert tunable.in_head == 0
    assert not tunable.model.head.weight.requires_grad


def test_a_head_alone_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="Wrapped has no head to train that its names tell"):
        spt.methods["linear"](Wrapped())
    with pytest.raises(ValueError, match="no head to train"):
        estimate_memory(tiny_vit(), (2, 3, 16, 16), method="linear", head="none")


def test_memory_accounts_for_the_head_that_it_is_told() -> None:
    model = Wrapped()
    known = estimate_memory(model, (2, 4, 24), method="linear", head="score")
    assert known.num_trainable == HEAD
    plan = make_plan(model, Method("linear", head="score"))
    with pytest.raises(ValueError, match="head: the plan has its own"):
        estimate_memory(model, (2, 4, 24), plan, head="score")


def test_patterns_are_checked_and_survive_json() -> None:
    assert Method("linear", head=["a", "b.*"]).head == ("a", "b.*")
    with pytest.raises(TypeError, match="head: expected names or patterns"):
        Method("linear", head=[torch.zeros(1)])
