"""Heads of models in 16 bits: trained in fp32, written into the weights that the model reads."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spt_kernels import (
    LoraSpec,
    Plan,
    SparseAdamW,
    apply,
    load_delta,
    merge,
    param_groups,
    save_delta,
    unload,
)
from spt_kernels.layers import LoraLinear, delta_of, sparse_deltas
from spt_kernels.model import describe
from spt_kernels.task.file.format import read
from spt_kernels.task.set_aside import merge_aside, unmerge
from spt_kernels.tuning import train_whole
from tests.models import tiny_batch, tiny_convnext, tiny_vit

HALVES = [torch.bfloat16, torch.float16]
OPTIMIZERS: list[Any] = [SparseAdamW, torch.optim.AdamW]


def tuned(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Module:
    model = tiny_vit(seed).to(dtype)
    info = describe(model)
    head = ("head.weight", "head.bias")
    what = {name: of for name, of in info.items() if name not in head}
    fc1 = "blocks.0.mlp.fc1.weight"
    plan = Plan({"blocks.1.mlp.fc1.weight": torch.tensor([3, 9])}, {}, what, head=head)
    return apply(
        model, Plan(plan.unstructured, {fc1: LoraSpec(1, ((0, 96),), 24)}, what, head=head)
    )


def loss_of(model: nn.Module) -> Tensor:
    images, labels = tiny_batch()
    dtype = model.patch_embed.proj.weight.dtype
    return F.cross_entropy(model(images.to(dtype)).float(), labels)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: make.__name__)
def test_the_head_takes_the_steps_that_fp32_values_take(dtype: torch.dtype, make: Any) -> None:
    model = tuned(dtype).eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert trained["head.weight_fp32"].shape == model.head.weight.shape
    values = [model._modules["head"]._parameters[n].detach().float() for n in ("weight", "bias")]
    values = [nn.Parameter(value.clone()) for value in values]
    groups = param_groups(model, weight_decay=0.1)
    decayed = [
        {name for name, p in trained.items() if any(p is q for q in g["params"])} for g in groups
    ]
    assert "head.weight_fp32" in decayed[0]
    assert "head.bias_fp32" in decayed[1]
    decays = [
        {"params": values[:1], "weight_decay": 0.1},
        {"params": values[1:], "weight_decay": 0},
    ]
    optimizer, other = make(groups, lr=1e-4), torch.optim.AdamW(decays, lr=1e-4)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model).backward()
        for value, name in zip(values, ("weight", "bias"), strict=True):
            value.grad = trained[f"head.{name}_fp32"].grad.clone()
        optimizer.step()
        other.step()
    for value, name in zip(values, ("weight", "bias"), strict=True):
        own = trained[f"head.{name}_fp32"]
        torch.testing.assert_close(own, value, rtol=1e-6, atol=1e-7)
        held = model._modules["head"]._parameters[name]
        assert torch.equal(held, own.detach().to(dtype))
        assert delta_of(own).target is held
    loss_of(model).backward()


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: make.__name__)
def test_grad_scaler(make: Any) -> None:
    model = tuned(torch.float16)
    optimizer, scaler = make(param_groups(model), lr=1e-2), torch.amp.GradScaler("cpu")
    before = model.head.weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert model.head.weight.isfinite().all()
    assert not torch.equal(model.head.weight, before)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_task_file_has_the_very_values(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny_vit().to(dtype).eval()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = tuned(dtype).eval()
    optimizer = SparseAdamW(param_groups(model), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    images = tiny_batch()[0].to(dtype)
    values = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("_fp32")}
    save_delta(model, tmp_path / "task.spt")
    dense = read(tmp_path / "task.spt").dense
    assert {f"{name}_fp32" for name in dense} == values.keys()
    assert all(torch.equal(tensor, values[f"{name}_fp32"]) for name, tensor in dense.items())
    with torch.no_grad():
        expected = model(images)
        other = load_delta(copy.deepcopy(base), tmp_path / "task.spt")
        assert torch.equal(other(images), expected)
        swapped = load_delta(tuned(dtype, seed=0), tmp_path / "task.spt").eval()
        assert torch.equal(swapped(images), expected)
        for m in (other, swapped):
            own = {n: p for n, p in m.named_parameters() if n.endswith("_fp32")}
            assert all(torch.equal(own[name], value) for name, value in values.items())
        merged = merge(other)
    assert type(merged.head) is nn.Linear
    assert torch.equal(merged.head.weight, values["head.weight_fp32"].to(dtype))
    for plain in (unload(model), unload(swapped)):
        assert type(plain.head) is nn.Linear
        assert all(p.requires_grad for p in plain.parameters())
        assert plain.state_dict().keys() == before.keys()
        assert all(torch.equal(v, before[name]) for name, v in plain.state_dict().items())


def test_copies_and_state_dicts() -> None:
    model = tuned()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    model.eval()
    with torch.no_grad():
        expected = loss_of(model)
        assert "head.weight_fp32" in model.state_dict()
        other = tuned(seed=1).eval()
        other.load_state_dict(model.state_dict())
        twins = [other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for twin in twins:
            assert torch.equal(loss_of(twin), expected)
            assert delta_of(twin.head.weight_fp32).whole
        # a move to fp32 and back loses nothing of what is trained
        values = model.head.weight_fp32.detach().clone()
        model.float().bfloat16()
        assert torch.equal(model.head.weight_fp32, values)
        assert torch.equal(model.head.weight, values.bfloat16())
        # without its values a state dict of the base says them all
        plain = tiny_vit(seed=2).bfloat16()
        model.load_state_dict(plain.state_dict(), strict=False)
        assert torch.equal(model.head.weight, plain.head.weight)
        assert torch.equal(model.head.weight_fp32, plain.head.weight.float())


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_state_dict_brings_weights_as_they_were_rounded(
    dtype: torch.dtype, stochastic: bool
) -> None:
    model, other = tuned(dtype), tuned(dtype)
    (delta,) = (d for d in sparse_deltas(model).values() if d.index.numel() == 2)
    optimizer = SparseAdamW([delta.delta], lr=2**-11, stochastic_rounding=stochastic, seed=2)
    for _ in range(4):
        loss_of(model).backward()
        optimizer.step()
        state = copy.deepcopy(model.state_dict())
        other.load_state_dict(state)
        assert all(torch.equal(v, state[name]) for name, v in other.state_dict().items())


@pytest.mark.parametrize("through_data", [True, False])
def test_a_head_that_is_initialised_after_it_was_tuned(through_data: bool) -> None:
    model = tuned()
    head = model.head.weight.data if through_data else model.head.weight
    nn.init.normal_(head, std=0.5)
    new = model.head.weight.detach().clone()
    loss_of(model).backward()
    torch.optim.SGD([model.head.weight_fp32], lr=0.0).step()
    assert torch.equal(model.head.weight, new)
    assert torch.equal(model.head.weight_fp32.bfloat16(), new)


def test_a_head_of_norms_and_layers_on_a_convnext() -> None:
    model = tiny_convnext().bfloat16()
    info = {n: what for n, what in describe(model).items() if not n.startswith("head")}
    head = tuple(n for n, _ in model.named_parameters() if n.startswith("head"))
    assert "head.norm.weight" in head
    types = {name: type(module) for name, module in model.named_modules()}
    apply(model, Plan({}, {}, info, head=head))
    images, labels = tiny_batch(size=32)
    F.cross_entropy(model(images.bfloat16()).float(), labels).backward()
    optimizer = SparseAdamW(param_groups(model), lr=1e-3)
    optimizer.step()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == {f"{name}_fp32" for name in head}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values())
    unload(model)
    assert {name: type(module) for name, module in model.named_modules()} == types


class Cosine(nn.Module):
    """Reads the weight of its head instead of calling it, and uses it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.tied = nn.Linear(8, 3, bias=False)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return F.linear(x, F.normalize(self.head.weight), self.head.bias) + self.tied(x)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_head_that_is_read_and_tied(compiled: bool) -> None:
    torch.manual_seed(0)
    model = Cosine().bfloat16()
    plain = copy.deepcopy(model)
    info = {n: what for n, what in describe(model).items() if n.startswith("body")}
    apply(model, Plan({}, {}, info, head=("head.weight", "head.bias")))
    assert model.head.weight_fp32 is model.tied.weight_fp32
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    x = torch.randn(5, 8, dtype=torch.bfloat16)
    run(x).float().square().sum().backward()
    plain(x).float().square().sum().backward()
    grad = plain.head.weight.grad.float()
    torch.testing.assert_close(model.head.weight_fp32.grad, grad, rtol=2e-2, atol=2e-2)
    for make in OPTIMIZERS:
        make(param_groups(model), lr=1e-2).step()
        assert torch.equal(model.tied.weight, model.head.weight_fp32.bfloat16())
    unload(model)
    assert model.head.weight is model.tied.weight
    assert torch.equal(model.head.weight, plain.head.weight)


def test_a_tied_head_is_merged_and_comes_back() -> None:
    torch.manual_seed(0)
    model = Cosine().bfloat16()
    info = {n: what for n, what in describe(model).items() if n.startswith("body")}
    apply(model, Plan({}, {}, info, head=("head.weight", "head.bias")))
    x = torch.randn(5, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        model.head.weight_fp32.add_(torch.randn(3, 8))
        expected = model(x)
        merged = merge_aside(model)
        assert torch.equal(model(x), expected)
        unmerge(model, merged)
        assert torch.equal(model(x), expected)
        assert torch.equal(merge(model)(x), expected)
    assert model.head.weight is model.tied.weight


def test_what_is_made_trainable_besides(tmp_path: Path) -> None:
    model = tuned().eval()
    train_whole(model, "norm.weight")  # a LayerNorm without deltas
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-3)
    loss_of(model).backward()
    optimizer.step()
    values = model.norm.weight_fp32.detach().clone()
    assert not torch.equal(values, torch.ones_like(values))
    save_delta(model, tmp_path / "task.spt")
    other = load_delta(tiny_vit().bfloat16().eval(), tmp_path / "task.spt")
    assert torch.equal(other.norm.weight_fp32, values)
    with torch.no_grad():
        assert torch.equal(loss_of(other), loss_of(model))
    with pytest.raises(ValueError, match=r"the base value of norm\.weight is not known"):
        unload(model)
    assert torch.equal(unload(other).norm.weight, tiny_vit().bfloat16().norm.weight)


def test_a_model_in_fp32_has_its_head_as_it_was() -> None:
    model = tuned(torch.float32)
    assert type(model.head) is nn.Linear
    assert model.head.weight.requires_grad
    assert "head.weight" not in sparse_deltas(model)
    assert isinstance(model.blocks[0].mlp.fc1, LoraLinear)


def test_a_copy_of_a_tied_head_trains_as_one() -> None:
    torch.manual_seed(0)
    model = Cosine().bfloat16()
    info = {n: what for n, what in describe(model).items() if n.startswith("body")}
    apply(model, Plan({}, {}, info, head=("head.weight", "head.bias")))
    x = torch.randn(5, 8, dtype=torch.bfloat16)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.head.weight_fp32 is twin.tied.weight_fp32
        optimizer = torch.optim.SGD([twin.head.weight_fp32], lr=0.1)
        for _ in range(2):  # the second forward reads what the first step has written
            twin(x).float().square().sum().backward()
            optimizer.step()
        assert torch.equal(twin.tied.weight, twin.head.weight_fp32.bfloat16())
        assert not torch.equal(twin.tied.weight, model.tied.weight)


def test_a_new_head_counts_where_a_compiled_forward_does_not_look() -> None:
    model = tuned()
    model.head.weight.data.normal_()
    new = model.head.weight.detach().float()
    groups = param_groups(model)
    assert torch.equal(model.head.weight_fp32, new)
    optimizer = SparseAdamW(groups, lr=1e-4)
    loss_of(model).backward()
    optimizer.step()
    torch.testing.assert_close(model.head.weight.float(), new, rtol=0.02, atol=1e-3)


def test_an_optimizer_made_before_a_coarse_head_alone_was_tuned() -> None:
    model = tiny_vit().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    apply(model, Plan({}, {}, {}, head=("head.weight", "head.bias")))
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="made before the plan was applied"):
        optimizer.step()


def test_a_trained_model_is_cast_the_same_with_tensors_swapped() -> None:
    model = tuned().float()
    optimizer = SparseAdamW(param_groups(model), lr=1e-2)
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    other = copy.deepcopy(model).to(torch.bfloat16)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    twin = SparseAdamW(param_groups(other), lr=1e-2)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (other, twin)):
        one.eval()
        loss_of(one).backward()
        its.step()
    state = other.state_dict()
    assert {d.target.dtype for d in sparse_deltas(model).values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("when", ["before it is tuned", "afterwards", "while it is trained"])
def test_a_head_of_convolutions_in_channels_last(when: str, tmp_path: Path) -> None:
    def make(*, last: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 2, 3)).bfloat16()
        return model.to(memory_format=torch.channels_last) if last else model

    def trained(*, last: bool) -> nn.Module:
        model = make(last=last and when == "before it is tuned")
        what = {"0.weight": describe(model)["0.weight"]}
        apply(model, Plan({"0.weight": torch.tensor([1, 7, 50])}, {}, what, head=head))
        if last and when == "afterwards":
            model.to(memory_format=torch.channels_last)
        optimizer = SparseAdamW(param_groups(model), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            model(images).float().square().mean().backward()
            optimizer.step()
            if last:
                model.to(memory_format=torch.channels_last)
        return model

    head = ("2.weight", "2.bias")
    images = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(1)).bfloat16()
    model, row_major = trained(last=True), trained(last=False)
    for (name, value), other in zip(model.named_parameters(), row_major.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-2, atol=1e-3, msg=name)
    save_delta(model, tmp_path / "task")
    for last in (False, True):
        loaded = load_delta(make(last=last), tmp_path / "task")
        assert torch.equal(loaded[2].weight_fp32, model[2].weight_fp32)
        assert torch.equal(loaded[2].weight, model[2].weight)
    expected, plain = make(last=True).state_dict(), unload(model)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, expected[name]), name
        assert value.stride() == expected[name].stride(), name
