"""What LoRA, biases and linear probing train, counted by hand on a tiny ViT."""

from __future__ import annotations

import pytest
from torch import nn

import spt_kernels as spt
from spt_kernels.methods import Method, make_plan
from spt_kernels.model import backbone_numel
from spt_kernels.plan import Plan
from tests.models import tiny_convnext, tiny_resnet, tiny_vit

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
    with pytest.raises(ValueError, match=r"budget: LoRA of rank 1 costs 192, got 191"):
        planned(tiny_vit(), Method("lora", budget=191))
    with pytest.raises(ValueError, match=r"budget: LoRA of rank 4 costs 768, got 400"):
        planned(tiny_vit(), Method("lora", budget=400, rank=4))


def test_a_model_without_attention_gets_lora_on_every_linear_matrix_of_its_blocks() -> None:
    plan = planned(tiny_convnext(), Method("lora", rank=1))
    dims = (8, 12, 16, 20)
    assert len(plan.structured) == 8
    assert plan.num_trainable == sum(2 * (d + 4 * d) for d in dims)


# of a tiny ResNet: input and output channels of each bottleneck, stem to head, and its width
BOTTLENECKS = ((64, 16, 4), (16, 16, 4), (16, 32, 8), (32, 32, 8))
SHORTCUTS = ((64, 16), (16, 16), (16, 32), (32, 32))  # all are strided, or change the channels


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_convolutions_of_1x1_get_lora_where_they_have_as_many_channels_as_the_rank(
    rank: int,
) -> None:
    matrices = [(a, w) for a, _, w in BOTTLENECKS] + [(w, b) for _, b, w in BOTTLENECKS]
    matrices += SHORTCUTS
    matrices += [(b, 1) for _, b, _ in BOTTLENECKS] * 2  # of squeeze-and-excitation
    expected = rank * sum(sum(sizes) for sizes in matrices if min(sizes) >= rank)
    assert planned(tiny_resnet(), Method("lora", rank=rank)).num_trainable == expected
    assert spt.methods[f"lora-{rank}"](tiny_resnet()).trained == expected


def test_without_convolutions_that_are_wide_enough_lora_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 33 channels on each side \(there are up to 32"):
        spt.methods["lora-33"](tiny_resnet())


def test_an_adapter_is_on_the_last_convolution_of_a_branch_not_on_gate_or_shortcut() -> None:
    plan = planned(tiny_resnet(), Method("adapter-2"))
    assert list(plan.structured) == [f"layer{i}.0.conv3.weight" for i in (1, 2, 3, 4)]
    assert plan.num_trainable == sum(2 * 2 * b + 2 + b for _, b, _ in BOTTLENECKS)


def test_names_that_tell_no_blocks_leave_lora_the_convolutions_between_stem_and_head() -> None:
    model = nn.Sequential()
    for name, layer in (
        ("conv1", nn.Conv2d(3, 8, 1)),
        ("bn1", nn.BatchNorm2d(8)),
        ("mix", nn.Conv2d(8, 6, 1)),
        ("space", nn.Conv2d(6, 6, 3)),
        ("hidden", nn.Linear(6, 6)),
        ("head", nn.Linear(6, 2)),
    ):
        model.add_module(name, layer)
    assert list(planned(model, Method("lora", rank=2)).structured) == ["mix.weight"]


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
