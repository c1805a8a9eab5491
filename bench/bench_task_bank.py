"""Requests for 1, 8 and 64 tasks over one ViT: a bank, merging, PEFT's mixed batch, many models."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.sensitivity import skewed_sensitivity

from .bench_swap import fill_trained
from .contest import hold

REQUESTS, CLASSES, SHARE, RANK = 64, 10, 0.0047, 8  # the paper's 0.4M of a ViT-B
SIZES = (1, 8, 64)
ROUNDS = 3  # each takes seconds


def architecture(device: torch.device) -> str:
    """A size that a batch of requests does not keep a machine for minutes."""
    return "vit_base_patch16_224" if device.type == "cuda" else "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def base(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(architecture(device), num_classes=CLASSES).eval().to(device)


@pytest.fixture(scope="module")
def tasks(base: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tasks of SPT-LoRA, all by one plan: sparse deltas, LoRA where they are many, own heads."""
    folder = tmp_path_factory.mktemp("tasks")
    model = copy.deepcopy(base)
    plan = spt.allocate(skewed_sensitivity(base), SHARE, "lora", rank=RANK)
    spt.apply(model, plan)
    paths = {}
    for n in range(max(SIZES)):
        fill_trained(model)
        paths[f"task{n}"] = folder / f"task{n}.safetensors"
        spt.save_delta(model, paths[f"task{n}"])
    return paths


def bank_of(base: nn.Module, tasks: Mapping[str, Path]) -> spt.TaskBank:
    bank = spt.TaskBank(copy.deepcopy(base))
    for name, path in tasks.items():
        bank.load(name, path)
    return bank


def one_by_one(
    model_of: Callable[[str], nn.Module], names: list[str], images: Tensor
) -> Callable[[], object]:
    """Each task's requests in a batch of their own, by the model for that task."""
    of_task = {name: [i for i, n in enumerate(names) if n == name] for name in names}

    @torch.inference_mode()
    def run() -> object:
        return [model_of(name)(images[own]) for name, own in of_task.items()]

    return run


def merged_of(base: nn.Module, tasks: Mapping[str, Path]) -> Callable[[str], nn.Module]:
    """The one model with a task merged into it, read from its file each time, as a server may."""
    kept = copy.deepcopy(base)
    state = {name: tensor.clone() for name, tensor in kept.state_dict().items()}

    def model_of(name: str) -> nn.Module:
        kept.load_state_dict(state)
        return spt.merge(spt.load_delta(kept, tasks[name]))

    return model_of


def peft_mixed(
    base: nn.Module, names: list[str], images: Tensor
) -> tuple[Callable[[], object], int]:
    """PEFT's LoRA-8 on qkv with `adapter_names`, and the bytes of its adapters."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=RANK, target_modules=r"blocks\.\d+\.attn\.qkv", modules_to_save=["head"]
    )
    first, *others = dict.fromkeys(names)
    model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=first)
    for name in others:
        model.add_adapter(name, config)
    fill_trained(model)
    model.eval()
    plain = sum(p.nbytes for p in base.parameters())
    added = sum(p.nbytes for p in model.parameters()) - plain
    run = torch.inference_mode()(lambda: model(images, adapter_names=names))
    return run, added


@pytest.mark.parametrize("n_tasks", SIZES)
def test_requests(
    benchmark: Any, base: nn.Module, tasks: dict[str, Path], n_tasks: int, device: torch.device
) -> None:
    chosen = dict(itertools.islice(tasks.items(), n_tasks))
    names = list(itertools.islice(itertools.cycle(chosen), REQUESTS))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(REQUESTS, 3, 224, 224, generator=generator).to(device)
    bank = bank_of(base, chosen)
    peft_run, peft_bytes = peft_mixed(base, names, images)
    models = {
        name: spt.merge(spt.load_delta(copy.deepcopy(base), path)) for name, path in chosen.items()
    }
    found = bank.run(images, names, together=True)
    assert isinstance(found, Tensor)
    for i, name in enumerate(names[:2]):
        alone = models[name](images[i : i + 1])[0]
        torch.testing.assert_close(found[i], alone, rtol=1e-3, atol=1e-3)
    hold(
        benchmark,
        f"{REQUESTS} requests of {n_tasks} tasks: {architecture(device)}, fp32",
        {
            "TaskBank.run": lambda: bank.run(images, names),  # on a CPU: each task alone
            "TaskBank.run, together=True": lambda: bank.run(images, names, together=True),
            "PEFT LoRA-8 on qkv, adapter_names": peft_run,
            "a merged model for each task": one_by_one(models.__getitem__, names, images),
            "load_delta and merge for each task": one_by_one(
                merged_of(base, chosen), names, images
            ),
        },
        rounds=ROUNDS,
        facts={
            "tasks": n_tasks,
            "bank_task_bytes": bank.nbytes(),
            "peft_adapter_bytes": peft_bytes,
            "model_per_task_bytes": n_tasks * sum(p.nbytes for p in base.parameters()),
        },
    )


def test_switch(benchmark: Any, base: nn.Module, tasks: dict[str, Path]) -> None:
    """Two tasks in memory at the same positions, and what reading them from files takes."""
    bank = bank_of(base, dict(itertools.islice(tasks.items(), 2)))
    in_bank, from_file = itertools.cycle(bank), itertools.cycle(list(tasks.values())[:2])
    model = spt.load_delta(copy.deepcopy(base), tasks["task0"])
    hold(
        benchmark,
        "switch between two tasks of one plan, in memory",
        {
            "TaskBank.use": lambda: bank.use(next(in_bank)),
            "spt.load_delta": lambda: spt.load_delta(model, next(from_file)),
        },
        rounds=21,
    )


def test_switch_of_a_vit_base(benchmark: Any, tmp_path: Path, device: torch.device) -> None:
    """The paper's 0.4M entries of all matrices and a head of 100 classes; 6 ms on two cores."""
    torch.manual_seed(0)
    base = timm.create_model("vit_base_patch16_224", num_classes=100).eval()
    first = skewed_sensitivity(base)
    flipped = {name: score.flip(0) for name, score in first.items()}
    scores = first, first, spt.Sensitivity.from_tensors(flipped, num_samples=1, info=first.info)
    paths = {}
    for name, own in zip(("one", "of one plan", "of another"), scores, strict=True):
        model = copy.deepcopy(base)
        spt.apply(model, spt.allocate(own, 400_000, None))
        fill_trained(model)
        paths[name] = tmp_path / f"{name}.safetensors"
        spt.save_delta(model, paths[name])
    of_one_plan, of_another = (
        bank_of(base.to(device), {"one": paths["one"], other: paths[other]})
        for other in ("of one plan", "of another")
    )
    orders = [itertools.cycle(bank) for bank in (of_one_plan, of_another)]
    hold(
        benchmark,
        "switch between two tasks of a ViT-B/16, 400,000 entries each, in memory",
        {
            "TaskBank.use, other positions": lambda: of_another.use(next(orders[1])),
            "TaskBank.use, the same positions": lambda: of_one_plan.use(next(orders[0])),
        },
        rounds=31,
    )
