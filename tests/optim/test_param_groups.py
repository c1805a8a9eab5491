"""Which trainable parameters are decayed, and in which order they come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from spt_kernels.optim import SparseAdamW, param_groups
from tests.models import tiny_vit


def test_param_groups_decay_matrices_only() -> None:
    model = tiny_vit()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(("head", "cls", "pos", "norm", "blocks.1"))
    names = {id(p): name for name, p in model.named_parameters()}

    decayed, plain = param_groups(model, weight_decay=0.05)

    assert (decayed["name"], decayed["weight_decay"]) == ("decayed", 0.05)
    assert (plain["name"], plain["weight_decay"]) == ("not decayed", 0.0)
    assert [names[id(p)] for p in decayed["params"]] == [
        "blocks.1.attn.proj.weight",
        "blocks.1.attn.qkv.weight",
        "blocks.1.mlp.fc1.weight",
        "blocks.1.mlp.fc2.weight",
        "head.weight",
    ]
    found = [names[id(p)] for p in plain["params"]]
    assert found == sorted(found)
    assert {"cls_token", "pos_embed", "norm.weight", "blocks.1.attn.qkv.bias"} <= set(found)
    assert len(found) + 5 == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("around", [lambda model: model, nn.DataParallel, torch.compile])
def test_what_a_model_lists_is_not_decayed_whatever_is_around_it(around: Any) -> None:
    model: Any = tiny_vit()
    model.no_weight_decay = lambda: {"blocks.1.attn.qkv.weight"}
    decayed, plain = (set(map(id, group["params"])) for group in param_groups(around(model)))
    assert id(model.blocks[1].attn.qkv.weight) in plain
    assert id(model.blocks[0].attn.qkv.weight) in decayed


def test_param_groups_fit_any_optimizer() -> None:
    model = tiny_vit().requires_grad_(False)
    model.head.requires_grad_(True)
    torch.optim.SGD(param_groups(model), lr=0.1)
    optimizer = SparseAdamW(param_groups(model))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]
    model.head.weight.requires_grad_(False)
    assert SparseAdamW(param_groups(model)).param_groups[0]["params"] == []  # biases alone


def test_param_groups_need_something_to_train() -> None:
    with pytest.raises(ValueError, match="no trainable parameters"):
        param_groups(tiny_vit().requires_grad_(False))


def test_param_groups_refuse_other_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        param_groups([])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weight_decay must be a number"):
        param_groups(tiny_vit(), weight_decay="0.1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight_decay must be at least 0, got -1"):
        param_groups(tiny_vit(), weight_decay=-1)
