"""A batch that mixes tasks equals each task running alone on a model of its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.bank import mixed_batch, task_bank
from spt_kernels.bank.layout import Layout
from spt_kernels.layers import sparse_deltas, write_deltas

from ..task.test_delta import KINDS
from .tasks import images, loaded, plain, saved


def models_of(name: str, paths: dict[str, Path]) -> dict[str | None, nn.Module]:
    """Each task on a model of its own, and the base."""
    return {None: plain(name), **{task: loaded(name, path) for task, path in paths.items()}}


@torch.no_grad()
def expected(models: dict[str | None, nn.Module], x: Tensor, tasks: Sequence[str | None]) -> Tensor:
    return torch.cat([models[task](x[i : i + 1]) for i, task in enumerate(tasks)])


def bank_of(model: nn.Module, paths: dict[str, Path]) -> spt.TaskBank:
    bank = spt.TaskBank(model)
    for task, path in paths.items():
        bank.load(task, path)
    return bank


@pytest.mark.parametrize("kind", KINDS)
def test_a_vits_batch(kind: str, tmp_path: Path) -> None:
    paths = {f"t{n}": saved(tmp_path, "vit", kind, n) for n in range(5)}
    model, x = plain("vit"), images("vit", 9)
    before = {name: p.clone() for name, p in model.named_parameters()}
    bank = bank_of(model, paths)
    models = models_of("vit", paths)
    for n_tasks in (1, 2, 5):
        some = list(paths)[:n_tasks]
        tasks = list(itertools.islice(itertools.cycle([*some, some[0], None]), len(x)))
        found = bank.run(x, tasks, together=True)
        torch.testing.assert_close(found, expected(models, x, tasks), rtol=1e-4, atol=2e-5)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["swin", "convnext"])
def test_windows_convolutions_and_norms_of_other_kinds(name: str, tmp_path: Path) -> None:
    paths = {kind: saved(tmp_path, name, kind, n) for n, kind in enumerate(KINDS)}
    tasks = ["lora", None, "adapter", "unstructured", "lora"]
    model, x = plain(name), images(name, len(tasks))
    before = {n: p.clone() for n, p in model.named_parameters()}
    bank = bank_of(model, paths)
    found = bank.run(x, tasks, together=True)
    truth = expected(models_of(name, paths), x, tasks)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=2e-5)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    bank.use("lora")  # depthwise convolutions were lent values, which the bank knows of


def test_kinds_and_numbers_of_classes_at_once(tmp_path: Path) -> None:
    paths = {
        "sparse": saved(tmp_path, "vit", "unstructured", 0),
        "lora": saved(tmp_path, "vit", "lora", 1, num_classes=7),
        "adapter": saved(tmp_path, "vit", "adapter", 2, num_classes=3),
    }
    tasks = ["lora", "adapter", "sparse", "lora"]
    x = images("vit", 4)
    bank = bank_of(plain("vit"), paths)
    found = bank.run(x, tasks, together=True)
    assert isinstance(found, list)
    assert [tuple(output.shape) for output in found] == [(7,), (3,), (5,), (7,)]
    models = models_of("vit", paths)
    for i, task in enumerate(tasks):
        truth = expected(models, x[i : i + 1], [task])[0]
        torch.testing.assert_close(found[i], truth, rtol=1e-4, atol=2e-5)
    alone = bank.run(x, tasks, together=False)
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_16_bits_it_is_as_exact_as_alone(kind: str, autocast: bool, tmp_path: Path) -> None:
    """A few roundings apart, on a way of some fifty of them."""
    models = models_of("vit", {f"t{n}": saved(tmp_path, "vit", kind, n) for n in range(2)})
    x = images("vit", 6)
    if not autocast:
        models, x = {task: own.bfloat16() for task, own in models.items()}, x.bfloat16()
    bank = spt.TaskBank(models[None])
    for task, own in models.items():
        if task is not None:
            bank.add(task, own)
    tasks = ["t0", "t1", None, "t1", "t0", "t0"]
    truth = []
    with torch.no_grad():
        for i, task in enumerate(tasks):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                truth.append(models[task](x[i : i + 1]))
    for together in (True, False):
        # torch keeps casts of weights within a region of autocast
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = bank.run(x, tasks, together=together)
        assert isinstance(found, Tensor)
        assert found.dtype == truth[0].dtype
        error = (found.float() - torch.cat(truth).float()).norm() / found.float().norm()
        assert error < 8 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_whatever_the_default_device_is(name: str, tmp_path: Path) -> None:
    paths = {kind: saved(tmp_path, name, kind, n, 5 + n) for n, kind in enumerate(KINDS)}
    tasks = ["lora", "adapter", "unstructured", "lora"]
    x, model = images(name, 4), plain(name)
    truth = [loaded(name, paths[task])(x)[i] for i, task in enumerate(tasks)]
    with torch.device("meta"):
        bank = bank_of(model, paths)
        for together in (True, False):
            found = bank.run(x, tasks, together=together)
            for one, other in zip(found, truth, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
        alike = bank.run(x, [None, None, "unstructured", None])
        assert isinstance(alike, Tensor)
        torch.testing.assert_close(alike[2], truth[2], rtol=1e-4, atol=2e-5)


def test_shapes_of_images_are_remembered_up_to_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def looked_at(model: nn.Module, like: Tensor) -> Layout:
        asked.append(like.shape[-1])
        return Layout({}, frozenset({"head.fc"}))

    monkeypatch.setattr(task_bank, "_MOST_LAYOUTS", 2)
    monkeypatch.setattr(Layout, "of", looked_at)
    bank = bank_of(plain("convnext"), {"a": saved(tmp_path, "convnext", "lora", 0)})
    for size in (64, 96, 64, 128, 64, 96, 128):
        bank.run(torch.randn(2, 3, size, size), ["a", None], together=True)
    assert asked == [64, 96, 128, 96, 128]  # 64 was used in between


def test_one_task_keeps_what_is_in_use(tmp_path: Path) -> None:
    paths = {f"t{n}": saved(tmp_path, "vit", "lora", n) for n in range(2)}
    bank = bank_of(plain("vit"), paths)
    bank.use("t0")
    x = images("vit", 4)
    with torch.no_grad():
        before = bank.model(x)
        bank.run(x, ["t1"] * 4)
        bank.run(x, ["t1", None, "t0", "t1"], together=True)
        assert torch.equal(bank.model(x), before)


def test_a_base_changed_behind_the_bank_is_noticed(tmp_path: Path) -> None:
    bank = bank_of(plain("vit"), {"a": saved(tmp_path, "vit", "lora", 0)})
    x = images("vit", 2)
    bank.run(x, ["a", None], together=True)
    with torch.no_grad():
        bank.model.get_parameter("blocks.0.mlp.fc1.weight").add_(1.0)
    for _ in range(2):  # nor is it taken for the base from then on
        with pytest.raises(ValueError, match=r"fc1\.weight was changed, moved or cast behind"):
            bank.run(x, ["a", None], together=True)


class Doubled(nn.Linear):
    """A Linear that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, 2 * self.weight, self.bias)


class Reads(nn.Module):
    """A model that reads a weight, calls a layer on tokens in front, and one on mixed samples."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(6, 6)
        self.turned = nn.Linear(6, 6)
        self.mixed = nn.Linear(6, 6)
        self.plain = nn.Linear(6, 6)
        self.doubled = Doubled(6, 6)
        self.hooked = nn.Linear(6, 6)
        self.hooked.register_forward_hook(lambda module, args, output: 2 * output)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale * nn.functional.linear(x, self.read.weight, self.read.bias)
        x = self.turned(x.transpose(0, 1)).transpose(0, 1)
        windows = x.view(len(x), 2, -1, 6).transpose(0, 1).flatten(0, 1)
        windows = self.mixed(windows.flatten(1, 1)).view(2, len(x), -1, 6).transpose(0, 1)
        return self.hooked(self.doubled(self.plain(windows.flatten(1, 2)))).mean(1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("read.weight", "read.weight: the model does not call it"),
        ("turned.weight", "turned.weight: its rows are not the samples of the batch"),
        ("mixed.bias", "mixed.bias: its rows are in another order than the samples"),
        ("scale", "scale belongs to a module of several layers"),
        ("hooked.weight", "hooked.weight belongs to a layer with a forward or hooks of its own"),
        ("doubled.weight", ""),
        ("plain.weight", ""),
    ],
    ids=lambda value: value if "." in value else "",
)
def test_what_cannot_be_mixed_runs_alone(name: str, message: str) -> None:
    torch.manual_seed(0)
    model = Reads().eval()
    x = torch.randn(2, 4, 6)
    truth = [model(x[:1])[0]]
    tuned = Reads()
    tuned.load_state_dict(model.state_dict())
    scores = {n: torch.rand_like(p) for n, p in model.named_parameters()}
    sensitivity = spt.Sensitivity.from_tensors({name: scores[name]}, num_samples=1)
    spt.apply(tuned, spt.allocate(sensitivity, 3, None))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
        write_deltas(sparse_deltas(tuned).values())  # what the model reads never notices
        truth.append(tuned(x[1:])[0])
    bank = spt.TaskBank(model)
    bank.add("t", tuned)
    torch.testing.assert_close(bank.run(x, [None, "t"]), torch.stack(truth))
    if message:
        with pytest.raises(ValueError, match=f"cannot run in one batch: {message}"):
            bank.run(x, [None, "t"], together=True)
    else:
        mixed = bank.run(x, [None, "t"], together=True)
        torch.testing.assert_close(mixed, torch.stack(truth))


def test_a_failed_forward_leaves_no_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {"a": saved(tmp_path, "convnext", "lora", 0)}
    model, x = plain("convnext"), images("convnext", 2)
    bank = bank_of(model, paths)
    before = {n: p.clone() for n, p in model.named_parameters()}
    bank.run(x, ["a", None], together=True)

    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(mixed_batch, "add_structured", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        bank.run(x, ["a", None], together=True)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("x", "tasks", "error", "message"),
    [
        (torch.zeros(2, 3), "ab", ValueError, "tasks must name one task for each of the 2 images"),
        (torch.zeros(2, 3), None, ValueError, "one task for each of the 2 images, got None"),
        (torch.zeros(2, 3), [None], ValueError, "one task for each of the 2 images"),
        (torch.zeros(0, 3), [], ValueError, "one task for each of the 0 images"),
        (torch.zeros(2, 3).int(), [None] * 2, TypeError, "images must be a floating tensor"),
        (torch.zeros(2, 3), [None, "nobody"], KeyError, "no task 'nobody'; it has none"),
    ],
)
def test_bad_arguments_are_refused(
    x: Tensor, tasks: Any, error: type[Exception], message: str
) -> None:
    bank = spt.TaskBank(nn.Linear(3, 2).eval())
    with pytest.raises(error, match=message):
        bank.run(x, tasks)


def test_a_model_in_training_mode_is_refused() -> None:
    bank = spt.TaskBank(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="must be in eval mode"):
        bank.run(torch.zeros(1, 3), [None])
