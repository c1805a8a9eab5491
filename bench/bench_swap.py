"""Swapping tasks of ViT-B/16 beside PEFT, and inference on the merged beside the plain model."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import spt_kernels as spt
from spt_kernels.sensitivity import skewed_sensitivity

from .contest import hold
from .machine import wait

BATCH, CLASSES, BUDGET = 8, 100, 400_000
RESTORED = 4 + 4 + 4  # bytes at each value: position, original, weight; gathered, written, restored


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", num_classes=CLASSES).eval()


@pytest.fixture(scope="module")
def tasks(base: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tasks of sparse deltas in every matrix, at different positions."""
    folder = tmp_path_factory.mktemp("tasks")
    first = skewed_sensitivity(base)
    flipped = {name: score.flip(0) for name, score in first.items()}
    second = spt.Sensitivity.from_tensors(flipped, num_samples=1, info=first.info)
    paths = []
    for n, sensitivity in enumerate((first, second)):
        model = copy.deepcopy(base)
        spt.apply(model, spt.allocate(sensitivity, BUDGET, None))
        fill_trained(model)
        paths.append(folder / f"task{n}.safetensors")
        spt.save_delta(model, paths[-1])
    return paths


def fill_trained(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.01)


def peft_swap(base: nn.Module, targets: str, folder: Path) -> Callable[[], None]:
    """Unmerge and drop one LoRA of rank 16, load another one from its file and merge it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=16, target_modules=targets, modules_to_save=["head"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    folders = [folder / str(n) for n in range(2)]
    for where in folders:
        fill_trained(model)
        model.save_pretrained(where)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folders[0], adapter_name="task0")
    model.merge_adapter()
    numbers = itertools.count(1)

    def swap() -> None:
        n = next(numbers)
        model.unmerge_adapter()
        model.load_adapter(folders[n % 2], adapter_name=f"task{n}")
        model.set_adapter(f"task{n}")
        model.delete_adapter(f"task{n - 1}")
        model.merge_adapter()

    return swap


def full_checkpoint(base: nn.Module, folder: Path, device: torch.device) -> Callable[[], object]:
    """A model fine-tuned as a whole, in the way of whoever keeps one file of all weights a task."""
    safetensors = pytest.importorskip("safetensors.torch")
    path = folder / "full.safetensors"
    safetensors.save_file(base.state_dict(), path)
    model = copy.deepcopy(base).to(device)
    return lambda: model.load_state_dict(safetensors.load_file(path))


def milliseconds(base: nn.Module, task: Path, verb: Callable[[nn.Module], object]) -> float:
    """Median time of something that is done to a model that a task was just loaded onto."""
    times = []
    for _ in range(3):
        model = spt.load_delta(copy.deepcopy(base), task)
        wait()
        start = time.perf_counter()
        verb(model)
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def test_swap_vit_b(
    benchmark: Any, base: nn.Module, tasks: list[Path], tmp_path: Path, device: torch.device
) -> None:
    model = spt.load_delta(copy.deepcopy(base).to(device), tasks[0])
    again = spt.load_delta(copy.deepcopy(base).to(device), tasks[0])
    order = itertools.cycle([tasks[1], tasks[0]])
    touched = sum(p.numel() for name, p in base.named_parameters() if name.startswith("blocks."))
    all_matrices = r"blocks\.\d+\.(attn|mlp)\.(qkv|proj|fc1|fc2)"
    on_device = copy.deepcopy(base).to(device)
    hold(
        benchmark,
        f"swap of tasks: ViT-B/16, fp32, {BUDGET:,} values in all matrices, from a file",
        {
            "spt.load_delta of another task": lambda: spt.load_delta(model, next(order)),
            "the same, other values at the same places": lambda: spt.load_delta(again, tasks[0]),
            "PEFT LoRA-16 on qkv: unmerge, load, merge": peft_swap(
                on_device, r"blocks\.\d+\.attn\.qkv", tmp_path / "qkv"
            ),
            "PEFT LoRA-16 on all matrices": peft_swap(on_device, all_matrices, tmp_path / "all"),
            "load_state_dict of a full checkpoint": full_checkpoint(base, tmp_path, device),
        },
        bytes_moved=4 * touched + 3 * RESTORED * BUDGET,
        targets={"PEFT LoRA-16 on qkv: unmerge, load, merge": 0.05},
        facts={
            "merge_ms": milliseconds(on_device, tasks[0], spt.merge),
            "unload_ms": milliseconds(on_device, tasks[0], spt.unload),
            "save_ms": milliseconds(
                on_device,
                tasks[0],
                lambda model: spt.save_delta(model, tmp_path / "saved.safetensors"),
            ),
            "task_bytes": tasks[0].stat().st_size,
        },
    )


def test_merged_inference_vit_b(
    benchmark: Any, base: nn.Module, tasks: list[Path], device: torch.device
) -> None:
    plain = copy.deepcopy(base).to(device)
    merged = spt.merge(spt.load_delta(copy.deepcopy(base).to(device), tasks[0]))
    types = [[type(module) for module in model.modules()] for model in (plain, merged)]
    assert types[0] == types[1]
    held = [sum(t.nbytes for t in model.state_dict().values()) for model in (plain, merged)]
    images = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)

    def run(model: nn.Module) -> Callable[[], object]:
        return torch.inference_mode()(lambda: model(images))

    hold(
        benchmark,
        f"inference: ViT-B/16, batch {BATCH}, fp32",
        {"merged": run(merged), "plain timm model": run(plain)},
        flops=2 * 17.6e9 * BATCH,
        targets={"plain timm model": 1.0},
        facts={"merged_bytes_over_plain": held[1] / held[0]},
    )
