"""Plans are equal when they say the same."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spt_kernels.methods import Method, make_plan
from spt_kernels.plan import Plan
from spt_kernels.sensitivity import skewed_sensitivity
from tests.models import tiny_vit

METHODS = (
    *(Method("spt-lora", 1500, 1), Method("spt-adapter", 1500, 1)),
    *(Method("spt-unstructured", 1500), Method("linear")),
)


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.name)
def plan(request: pytest.FixtureRequest) -> Plan:
    model = tiny_vit()
    made = make_plan(model, request.param, skewed_sensitivity(model))
    assert made is not None
    return made


def test_what_is_loaded_is_what_was_saved(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.safetensors")
    loaded = Plan.load(tmp_path / "plan.safetensors")
    assert loaded == plan
    assert hash(loaded) == hash(plan)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert copy.deepcopy(plan) == plan
    assert len({loaded, plan}) == 1


def test_another_plan_is_not_equal(plan: Plan) -> None:
    others = [replace(plan, budget=plan.budget + 1), replace(plan, rule="published-code")]
    others.append(replace(plan, head=()))
    if plan.structured:
        name, *_ = plan.structured
        others.append(
            replace(plan, structured={n: s for n, s in plan.structured.items() if n != name})
        )
    if plan.unstructured:
        name = max(plan.unstructured, key=lambda n: plan.unstructured[n].numel())
        fewer = {**plan.unstructured, name: plan.unstructured[name][:-1]}
        moved = plan.unstructured[name].clone()
        moved[0] = moved[0] - 1 if moved[0] else moved[0]
        others.append(replace(plan, unstructured=fewer))
        if not torch.equal(moved, plan.unstructured[name]):
            others.append(replace(plan, unstructured={**plan.unstructured, name: moved}))
    for other in others:
        assert other != plan
    assert plan != "a plan"
