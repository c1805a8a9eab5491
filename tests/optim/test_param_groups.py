"""Which trainable parameters are decayed, and in which order they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import spt_kernels as spt
from spt_kernels import apply
from spt_kernels.optim import SparseAdamW, param_groups
from tests.models import tiny_batch, tiny_vit
from tests.tuning.test_tuning import unstructured


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_head_that_is_cast_after_apply_is_trained_in_fp32(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    images, labels = tiny_batch()
    found = []
    for is_late in (False, True):
        model: Any = tiny_vit() if is_late else tiny_vit().to(dtype)
        apply(model, unstructured(model))
        model = nn.ModuleDict({"inside": model.to(dtype)})
        optimizer = SparseAdamW(param_groups(model), lr=1e-5)
        model = model["inside"]
        assert dict(model.named_parameters())["head.weight_fp32"].requires_grad
        for _ in range(3):
            F.cross_entropy(model(images.to(dtype)).float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        spt.save_delta(model, tmp_path / str(is_late))
        found.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0.01, atol=1e-4)
    base = spt.unload(model)
    assert type(base.head) is nn.Linear
    assert torch.equal(base.head.weight, tiny_vit().head.weight.to(dtype))
    loaded = spt.load_delta(base, tmp_path / "True")
    assert torch.equal(loaded.head.weight, found[1]["head.weight_fp32"].to(dtype))


def test_what_is_trained_and_not_shared_is_refused(tmp_path: Path) -> None:
    model = tiny_vit()
    apply(model, unstructured(model)).bfloat16()
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        shared = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(RuntimeError, match=r"head\.weight_fp32 is trained, and Distr"):
            param_groups(shared)
        own = nn.parallel.DistributedDataParallel(model)
        beside = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        assert param_groups(nn.ModuleList([own, beside, nn.Linear(2, 2)]))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("is_cast_before", [True, False])
def test_a_state_dict_of_a_head_that_was_cast_is_loaded(is_cast_before: bool, assign: bool) -> None:
    saved, fresh = (apply(tiny_vit(), unstructured(tiny_vit())) for _ in range(2))
    param_groups(saved.bfloat16())
    with torch.no_grad():
        dict(saved.named_parameters())["head.weight_fp32"].add_(0.01)
    saved(tiny_batch()[0].bfloat16())
    state = saved.state_dict()
    around = nn.ModuleDict({"inside": fresh.bfloat16() if is_cast_before else fresh})
    loaded = {f"inside.{name}": tensor.clone() for name, tensor in state.items()}
    around.load_state_dict(loaded, assign=assign)
    if not is_cast_before:
        assert torch.equal(fresh.head.weight, state["head.weight_fp32"])
    param_groups(around.bfloat16())
    assert fresh.state_dict().keys() == state.keys()
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_an_optimizer_of_a_head_that_was_not_cast_yet_is_refused() -> None:
    model = apply(tiny_vit(), unstructured(tiny_vit()))
    early = SparseAdamW(param_groups(model))
    late = SparseAdamW(param_groups(model.bfloat16()))
    for optimizer in (late, early):
        model(tiny_batch()[0].bfloat16()).float().square().sum().backward()
        if optimizer is early:
            with pytest.raises(RuntimeError, match=r"holds head\.\w+, which was cast to 16 bits"):
                early.step()
        else:
            late.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_dict_without_values_in_fp32_is_loaded(dtype: torch.dtype) -> None:
    saved, fresh = (apply(tiny_vit(), unstructured(tiny_vit())) for _ in range(2))
    with torch.no_grad():
        saved.head.weight.add_(0.01)
    state = saved.to(dtype).state_dict()
    param_groups(fresh.bfloat16())
    fresh.load_state_dict(state)
    head = dict(fresh.named_parameters())["head.weight_fp32"]
    assert torch.equal(head, saved.head.weight.float())


def test_a_state_dict_that_does_not_fit_changes_no_head() -> None:
    saved, fresh = (apply(tiny_vit(), unstructured(tiny_vit())).bfloat16() for _ in range(2))
    param_groups(saved)
    state = {n: t[:2] if n.startswith("head.") else t for n, t in saved.state_dict().items()}
    names = [name for name, _ in fresh.named_parameters()]
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict(state)
    assert [name for name, _ in fresh.named_parameters()] == names


def test_a_head_that_is_trained_on_after_it_was_loaded_is_what_it_is_then() -> None:
    saved, fresh = (apply(tiny_vit(), unstructured(tiny_vit())) for _ in range(2))
    param_groups(saved.bfloat16())
    fresh.load_state_dict(saved.state_dict())
    with torch.no_grad():
        fresh.head.weight.add_(1.0)
    expected = fresh.head.weight.detach().bfloat16().float()
    param_groups(fresh.bfloat16())
    assert torch.equal(dict(fresh.named_parameters())["head.weight_fp32"], expected)
