"""A task taken aside leaves the base, and comes back to the bit with the very parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.task.set_aside import merge_aside, put_task_back, take_aside, unmerge
from tests.models import tiny_batch, tiny_vit
from tests.short_memory import allocations, running_out


class Net(nn.Module):
    """Running statistics, a convolution in channels-last format, a token that is read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.norm(self.conv(x))) * self.scale
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


X, LABELS = tiny_batch()
MAKERS: dict[str, Any] = {
    "lora": (tiny_vit, 1200, "lora"),
    "adapter": (tiny_vit, 1200, "adapter"),
    "single entries": (tiny_vit, 600, None),
    "net": (Net, 60, None),
}


def tuned(kind: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """A base model, the same trained for two steps, and its optimizer."""
    make, budget, structured = MAKERS[kind]
    model = make()
    sensitivity = spt.measure_sensitivity(model, [(X, LABELS)], num_samples=2)
    plan = spt.allocate(sensitivity, budget, structured, 2, dropout=0.0)
    base = make().to(dtype)
    model = spt.apply(make().to(dtype), plan)
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=1e-2, stochastic_rounding=True)
    for _ in range(2):
        step(model, optimizer)
    return base.eval(), model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    F.cross_entropy(model(X.to(next(model.parameters()).dtype)).float(), LABELS).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back(kind: str, dtype: torch.dtype) -> None:
    base, model, optimizer = tuned(kind, dtype)
    before, objects = state(model), {n: id(p) for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    formats = [p.stride() for p in model.parameters()]
    aside = take_aside(model)
    assert same(state(model), state(base))
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert [p.stride() for p in model.parameters()] == [p.stride() for p in base.parameters()]
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "spt_tuning")
    put_task_back(model, aside)
    assert same(state(model), before)
    assert {n: id(p) for n, p in model.named_parameters()} == objects
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert [p.stride() for p in model.parameters()] == formats
    weights = state(model)
    step(model, optimizer)
    assert not same(state(model), weights)
    assert same(state(spt.unload(model)), state(base))


def test_a_delta_that_was_changed_meanwhile_is_written() -> None:
    base, model, _ = tuned("single entries", torch.float32)
    name, delta = next((n, p) for n, p in model.named_parameters() if n.endswith("fc1.delta"))
    layer = model.get_submodule(name.removesuffix(".delta"))
    aside = take_aside(model)
    with torch.no_grad():
        delta.add_(1.0)
    put_task_back(model, aside)
    expected = base.get_submodule(name.removesuffix(".delta")).weight.detach().flatten()
    expected = expected[layer.index.long()] + delta
    assert torch.equal(layer.weight.flatten()[layer.index.long()], expected)


def test_the_model_may_be_cast_meanwhile() -> None:
    base, model, _ = tuned("lora", torch.float32)
    aside = take_aside(model)
    model.to(torch.bfloat16)
    put_task_back(model, aside)
    for module in model.modules():
        for local, delta in getattr(module, "sparse_deltas", dict)().items():
            if not delta.whole:
                assert delta.delta.dtype == torch.float32
                found = delta.target.flatten()[delta.index.long()]
                expected = (delta.original.float() + delta.delta).to(torch.bfloat16)
                assert torch.equal(found, expected), local
    plain = take_aside(model)
    assert same(state(model), state(base.to(torch.bfloat16)))
    assert plain.modules


def of_other_classes(task: Any) -> nn.Module:
    """The base of a task with a head of another number of classes; the task is saved as a file."""
    sensitivity = spt.measure_sensitivity(tiny_vit(), [(X, LABELS)], num_samples=2)
    model = spt.apply(tiny_vit(), spt.allocate(sensitivity, 300, None))
    spt.save_delta(model, task)
    other = tiny_vit(num_classes=3)
    for name, p in tiny_vit().named_parameters():
        if not name.startswith("head."):
            other.get_parameter(name).data.copy_(p)
    return other


def test_a_head_of_another_number_of_classes_goes_along(tmp_path: Any) -> None:
    other = of_other_classes(tmp_path / "task")
    before = state(other)
    spt.load_delta(other, tmp_path / "task")
    head, expected = other.head, other(X)
    aside = take_aside(other)
    assert same(state(other), before)
    assert other.num_classes == 3
    put_task_back(other, aside)
    assert other.head is head
    assert other.num_classes == 5
    assert torch.equal(other(X), expected)


def test_what_cannot_be_undone_is_refused() -> None:
    _, model, _ = tuned("lora", torch.float32)
    model.patch_embed.proj.weight.requires_grad_(True)
    before = state(model)
    with pytest.raises(ValueError, match=r"cannot take the task off: .*patch_embed\.proj\.weight"):
        take_aside(model)
    assert same(state(model), before)


def everything(model: nn.Module) -> tuple[Any, ...]:
    """What of a model may not change where an exchange is given up."""
    parameters = dict(model.named_parameters())
    return (
        {n: (id(p), p.stride(), p.requires_grad, id(p.grad)) for n, p in parameters.items()},
        [type(module) for module in model.modules()],
        [id(module) for module in model.modules()],
        (len(model._load_state_dict_pre_hooks), len(model._load_state_dict_post_hooks)),
        (getattr(model, "num_classes", None), hasattr(model, "spt_tuning")),
    )


def tuned_by_file(tmp_path: Any) -> nn.Module:
    """Tuned, with a head of another number of classes in the place of the model's own."""
    other = of_other_classes(tmp_path / "task")
    return spt.load_delta(other, tmp_path / "task")


@pytest.mark.parametrize("kind", [*MAKERS, "other head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_memory_runs_out_all_is_as_it_was(
    kind: str, dtype: torch.dtype, tmp_path: Any
) -> None:
    model = tuned_by_file(tmp_path) if kind == "other head" else tuned(kind, dtype)[1]
    made: list[Any] = [take_aside(model)]
    steps: list[tuple[Any, Any]] = [
        (lambda: put_task_back(model, made[0]), lambda: made.__setitem__(0, take_aside(model))),
        (lambda: made.__setitem__(0, take_aside(model)), lambda: put_task_back(model, made[0])),
    ]
    if kind in ("lora", "single entries", "net"):
        there = (lambda: made.__setitem__(0, merge_aside(model)), lambda: unmerge(model, made[0]))
        steps += [there, (there[1], there[0])]
    for place, (step, back) in enumerate(steps):
        count = allocations(step)
        assert count > 0
        back()
        before, weights, now = everything(model), state(model), made[0]
        for refused in range(count):
            # the way back of the net makes a row-major copy of a weight in channels-last format
            with running_out(range(refused, refused + 1 if kind == "net" else count * 9)):
                step()
            assert everything(model) == before, refused
            assert same(state(model), weights), refused
            assert made[0] is now
        step()
        if place in (1, 2):  # the next one begins where this one does
            back()


def test_what_was_trained_whole_and_is_not_written_yet_comes_back() -> None:
    _, model, _ = tuned("single entries", torch.bfloat16)
    with torch.no_grad():
        model.head.bias_fp32.add_(1.0)
    values = model.head.bias_fp32.detach().to(torch.bfloat16)
    put_task_back(model, take_aside(model))
    assert torch.equal(model.head.bias, values)
