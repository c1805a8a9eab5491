"""What each method trains, counted by hand on a tiny ViT."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spt_kernels import Sensitivity, method_plan
from spt_kernels.method import METHODS, Method
from tests.models import tiny_convnext, tiny_vit

WIDTH, DEPTH = 24, 2
HEAD = 5 * WIDTH + 5


def scores(model: nn.Module) -> Sensitivity:
    generator = torch.Generator().manual_seed(0)
    named = {
        name: torch.rand(p.shape, generator=generator)
        for name, p in model.named_parameters()
        if name.startswith("blocks.")
    }
    return Sensitivity.from_tensors(named, 8, head=("head.weight", "head.bias"))


def test_uniform_lora_is_on_query_and_value_alone() -> None:
    plan = method_plan.plan_uniform_lora(tiny_vit(), Method("lora", rank=2))
    assert list(plan.structured) == ["blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"]
    for spec in plan.structured.values():
        assert spec.rows == ((0, WIDTH), (2 * WIDTH, 3 * WIDTH))
    assert plan.num_trainable == DEPTH * 2 * 2 * (WIDTH + WIDTH)


@pytest.mark.parametrize(("budget", "rank"), [(192, 1), (383, 1), (384, 2), (1000, 5)])
def test_uniform_lora_takes_the_largest_rank_that_fits(budget: int, rank: int) -> None:
    plan = method_plan.plan_uniform_lora(tiny_vit(), Method("lora", budget=budget))
    assert {spec.rank for spec in plan.structured.values()} == {rank}
    assert plan.num_trainable == rank * 192 <= budget


def test_a_budget_below_rank_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budget: LoRA of rank 1 on q and v costs 192, got 191"):
        method_plan.plan_uniform_lora(tiny_vit(), Method("lora", budget=191))
    with pytest.raises(ValueError, match=r"budget: LoRA of rank 4 costs 768, got 400"):
        method_plan.plan_uniform_lora(tiny_vit(), Method("lora", budget=400, rank=4))


def test_a_model_without_attention_gets_lora_on_every_linear_matrix_of_its_blocks() -> None:
    plan = method_plan.plan_uniform_lora(tiny_convnext(), Method("lora", rank=1))
    dims = (8, 12, 16, 20)
    assert len(plan.structured) == 8
    assert plan.num_trainable == sum(2 * (d + 4 * d) for d in dims)


def test_biases_are_all_of_the_blocks_and_the_last_norm() -> None:
    plan = method_plan.plan_biases(tiny_vit())
    per_block = 3 * WIDTH + WIDTH + 4 * WIDTH + WIDTH + 2 * WIDTH  # qkv, proj, fc1, fc2, two norms
    assert plan.num_trainable == DEPTH * per_block + WIDTH
    assert all(name.endswith(".bias") for name in plan.unstructured)


def test_spt_methods_need_scores_and_keep_the_budget() -> None:
    model = tiny_vit()
    for name, kind in (
        ("spt-lora", "lora"),
        ("spt-adapter", "adapter"),
        ("spt-unstructured", None),
    ):
        with pytest.raises(ValueError, match="sensitivity"):
            method_plan.make_plan(model, Method(name))
        plan = method_plan.make_plan(model, Method(name, budget=500, rank=2), scores(model))
        assert plan is not None
        assert plan.num_trainable == 500
        assert plan.kind == kind


def test_a_share_is_of_the_backbone() -> None:
    model = tiny_vit()
    backbone = sum(p.numel() for p in model.parameters()) - HEAD
    assert method_plan.backbone_numel(model) == backbone
    assert method_plan.count_of(0.01, backbone) == int(0.01 * backbone)
    assert method_plan.count_of(77, backbone) == 77


@pytest.mark.parametrize("name", METHODS)
def test_a_prepared_model_trains_its_plan_and_its_head(name: str) -> None:
    model = tiny_vit()
    total = sum(p.numel() for p in model.parameters())
    budget = 500 if name.startswith("spt") or name == "lora" else None
    sensitivity = scores(model) if name.startswith("spt") else None
    plan = method_plan.make_plan(model, Method(name, budget=budget), sensitivity)
    method_plan.prepare(model, plan)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == (total if plan is None else plan.num_trainable + HEAD)
