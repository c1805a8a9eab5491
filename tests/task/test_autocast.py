"""Tasks that come and go within one region of autocast, which keeps casts of the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt
from spt_kernels.task.set_aside import merge_aside, put_task_back, take_aside, unmerge
from tests.models import tiny_batch, tiny_vit

IMAGES, LABELS = tiny_batch()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_vit()
    sensitivity = spt.measure_sensitivity(model, [(IMAGES, LABELS)], num_samples=4)
    spt.apply(model, spt.allocate(sensitivity, 800, "lora", rank=1))
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=0.1)
    for _ in range(3):
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
        optimizer.zero_grad()
    path: Path = tmp_path_factory.mktemp("autocast") / "task.safetensors"
    spt.save_delta(model, path)
    return path


def seen(model: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(IMAGES)


Change = Callable[[nn.Module], object]
CHANGES: dict[str, Change] = {
    "unload": spt.unload,
    "merge": spt.merge,
    "aside": take_aside,
    "aside and back": lambda model: put_task_back(model, take_aside(model)),
    "merged": merge_aside,
    "merged and back": lambda model: unmerge(model, merge_aside(model)),
}


def test_merging_within_autocast_is_merging(file: Path) -> None:
    model, twin = (spt.load_delta(tiny_vit(), file) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        spt.merge(model)
    expected = dict(spt.merge(twin).named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


def test_a_model_in_double_precision_is_merged_in_it(file: Path) -> None:
    model, images = spt.load_delta(tiny_vit(), file).double(), IMAGES.double()
    with torch.no_grad():
        before, after = model(images), spt.merge(model)(images)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CHANGES)
def test_a_task_that_goes_leaves_no_casts_behind(name: str, file: Path) -> None:
    model = spt.load_delta(tiny_vit(), file)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(IMAGES)  # casts what requires a gradient, and keeps that
        CHANGES[name](model)
        within = model(IMAGES)
    assert torch.equal(within, seen(model))
    assert torch.equal(before, within) == name.endswith("back")


def test_a_task_that_comes_is_seen_at_once(file: Path) -> None:
    model = tiny_vit()
    with torch.autocast("cpu", torch.bfloat16):
        before = model(IMAGES)
        spt.load_delta(model, file)
        within = model(IMAGES)
    assert torch.equal(within, seen(model))
    assert not torch.equal(before, within)
