"""Task files of small models, and what each of their models says by itself."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import spt_kernels as spt

from ..models import tiny_batch
from ..task.test_delta import MODELS, base, make_plan

N = 4  # of `task_files`


def images(name: str, n: int) -> Tensor:
    return tiny_batch(n, size=MODELS[name][1], seed=9)[0]


@functools.cache
def _base(name: str) -> nn.Module:
    return base(name)


def plain(name: str) -> nn.Module:
    """A copy of the base that all tasks are for."""
    return copy.deepcopy(_base(name))


@functools.cache
@torch.no_grad()
def _tuned(name: str, kind: str, seed: int, num_classes: int) -> nn.Module:
    model = base(name, num_classes=num_classes)
    spt.apply(model, make_plan(model, kind, seed))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@functools.cache
def _content(name: str, kind: str, seed: int, num_classes: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task"
        spt.save_delta(_tuned(name, kind, seed, num_classes), path)
        return path.read_bytes()


def saved(folder: Path, name: str, kind: str, seed: int = 0, num_classes: int = 5) -> Path:
    """The file of a task: its positions and values hang on `kind` and `seed`."""
    path = folder / f"{name}-{kind}-{seed}-{num_classes}.safetensors"
    path.write_bytes(_content(name, kind, seed, num_classes))
    return path


def loaded(name: str, path: Path) -> nn.Module:
    """The task alone on a model of its own."""
    return spt.load_delta(plain(name), path).eval()


def task_files(folder: Path) -> dict[str, Path]:
    """Tasks of one ViT, by name."""
    kinds = ("unstructured", "lora", "adapter", "unstructured")
    return {f"t{n}": saved(folder, "vit", kind, n) for n, kind in enumerate(kinds)}


def check(bank: spt.TaskBank, name: str, outputs: dict[str, torch.Tensor]) -> None:
    """Put a task on, and hold what the model says then against what it says alone."""
    with torch.no_grad():
        torch.testing.assert_close(
            bank.use(name)(images("vit", 2)), outputs[name], rtol=1e-4, atol=2e-5
        )
