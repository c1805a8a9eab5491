"""The method that a plan is of is read from the plan."""

from __future__ import annotations

import pytest

from spt_kernels.finetuning.job.given_plan import check_affords, check_agrees, method_of
from spt_kernels.methods import METHODS, Method, entry_of, make_plan
from spt_kernels.plan import Plan
from spt_kernels.sensitivity import skewed_sensitivity
from tests.models import tiny_vit

WITH_PLANS = tuple(
    name.replace("-K", "-2")
    for name, entry in METHODS.items()
    if entry.holds is not None and not entry.is_baseline
)


def plan_of(method: Method) -> Plan:
    model = tiny_vit()
    made = make_plan(model, method, skewed_sensitivity(model))
    assert made is not None
    return made


@pytest.mark.parametrize("name", WITH_PLANS)
def test_a_plan_tells_its_method_and_options(name: str) -> None:
    options = entry_of(name).options
    method = Method(
        name,
        budget=1500 if "budget" in options else None,
        rank=1 if "rank" in options else None,
        samples=1 if "samples" in options else Method.samples,
        dropout=0.2 if "dropout" in options else Method.dropout,
    )
    plan = plan_of(method)
    found = method_of(plan)
    assert found.name == name
    assert (found.rank, found.samples, found.dropout) == (
        method.rank,
        method.samples,
        method.dropout,
    )
    assert found.budget == (plan.budget if "budget" in options else None)
    check_agrees(plan, name, {"budget": plan.budget} if "budget" in options else {})


def test_a_share_is_compared_as_the_number_it_comes_to() -> None:
    plan = plan_of(Method("spt-lora", 0.05, 1))
    check_agrees(plan, None, {"budget": 0.05})
    check_agrees(plan, None, {"budget": plan.budget})
    with pytest.raises(ValueError, match=r"budget: the plan decides, and has [\d,]+, got 0\.2"):
        check_agrees(plan, None, {"budget": 0.2})
    with pytest.raises(ValueError, match=r"scale: the plan decides, and has 1\.0, got 2\.0"):
        check_agrees(plan, None, {"scale": 2.0})
    with pytest.raises(ValueError, match="samples: the plan decides, and has none, got 5"):
        check_agrees(plan_of(Method("lora")), "lora", {"samples": 5})


def test_what_the_smallest_module_costs_is_the_least_budget() -> None:
    plan = plan_of(Method("spt-lora", 47, 1))  # 24 in, 24 out
    with pytest.raises(ValueError, match="the smallest LoRA of rank 1 costs 48, got 47"):
        check_affords(plan)
    check_affords(plan_of(Method("spt-lora", 48, 1)))


@pytest.mark.parametrize("budget", [1.0, 2.5, float("inf"), float("nan"), 0, -1, 0.0])
def test_a_budget_that_is_no_number_and_no_share_is_refused_when_it_is_named(
    budget: float,
) -> None:
    with pytest.raises(ValueError, match="budget: expected a whole number"):
        Method("spt-lora", budget)
