"""What LoRA, biases and linear probing train, counted by hand on a tiny ViT."""

from __future__ import annotations

import pytest
from torch import nn

from spt_kernels.methods import Method, make_plan
from spt_kernels.model import backbone_numel
from spt_kernels.plan import Plan
from tests.models import tiny_convnext, tiny_vit

WIDTH, DEPTH = 24, 2
HEAD = 5 * WIDTH + 5


def planned(model: nn.Module, method: Method) -> Plan:
    plan = make_plan(model, method)
    assert plan is not None
    return plan


def test_uniform_lora_is_on_query_and_value_alone() -> None:
    plan = planned(tiny_vit(), Method("lora", rank=2))
    assert list(plan.structured) == ["blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"]
    for spec in plan.structured.values():
        assert spec.rows == ((0, WIDTH), (2 * WIDTH, 3 * WIDTH))
    assert plan.num_trainable == DEPTH * 2 * 2 * (WIDTH + WIDTH)


@pytest.mark.parametrize(("budget", "rank"), [(192, 1), (383, 1), (384, 2), (1000, 5)])
def test_uniform_lora_takes_the_largest_rank_that_fits(budget: int, rank: int) -> None:
    plan = planned(tiny_vit(), Method("lora", budget=budget))
    assert {spec.rank for spec in plan.structured.values()} == {rank}
    assert plan.num_trainable == rank * 192 <= budget


def test_a_budget_below_rank_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budget: LoRA of rank 1 on q and v costs 192, got 191"):
        planned(tiny_vit(), Method("lora", budget=191))
    with pytest.raises(ValueError, match=r"budget: LoRA of rank 4 costs 768, got 400"):
        planned(tiny_vit(), Method("lora", budget=400, rank=4))


def test_a_model_without_attention_gets_lora_on_every_linear_matrix_of_its_blocks() -> None:
    plan = planned(tiny_convnext(), Method("lora", rank=1))
    dims = (8, 12, 16, 20)
    assert len(plan.structured) == 8
    assert plan.num_trainable == sum(2 * (d + 4 * d) for d in dims)


def test_biases_are_all_of_the_blocks_and_the_last_norm() -> None:
    plan = planned(tiny_vit(), Method("bias"))
    per_block = 3 * WIDTH + WIDTH + 4 * WIDTH + WIDTH + 2 * WIDTH  # qkv, proj, fc1, fc2, two norms
    assert plan.num_trainable == DEPTH * per_block + WIDTH
    assert all(name.endswith(".bias") for name in plan.unstructured)


def test_a_share_is_of_the_backbone() -> None:
    model = tiny_vit()
    backbone = sum(p.numel() for p in model.parameters()) - HEAD
    assert backbone_numel(model) == backbone
    assert Method("lora", 0.01).count(backbone) == int(0.01 * backbone)
    assert Method("lora", 77).count(backbone) == 77
    assert Method("lora").count(backbone) == int(0.005 * backbone)
    with pytest.raises(ValueError, match=r"a share of the backbone below 1, got 1\.5"):
        Method("lora", 1.5).count(backbone)


def test_linear_probing_trains_the_head_alone() -> None:
    plan = planned(tiny_vit(), Method("linear"))
    assert plan.num_trainable == 0
    assert plan.head == ("head.weight", "head.bias")
