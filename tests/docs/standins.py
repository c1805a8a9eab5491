"""What a page's Python finds in place of a user's model, loader and files: the same, but tiny."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import spt_kernels as spt
from spt_kernels.benchmarks.vtab import VTAB
from tests.benchmarks.test_fgvc import write_fgvc
from tests.benchmarks.test_vtab import write_vtab
from tests.finetuning.pictures_on_disk import write_task

# twelve blocks, as examples count them; images of any size, so that those of an example fit
_SMALL = {
    **{"embed_dim": 12, "num_heads": 3, "depth": 12},
    **{"patch_size": 32, "dynamic_img_size": True},
}


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Let timm make small ViTs, whatever is asked for, with weights that are always the same."""
    create = timm.create_model

    def small(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: nn.Module = create("vit_tiny_patch16_224", **{**arguments, **_SMALL})
        return model

    patch.setattr(timm, "create_model", small)


def names() -> dict[str, Any]:
    """The names that a page may use without making them."""
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    batches = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    given = {"spt": spt, "torch": torch, "F": F, "timm": timm, "nn": nn}
    return {**given, "images": images, "labels": labels, "batches": batches, "loader": batches}


def _base(names: Mapping[str, Any]) -> nn.Module:
    return timm.create_model("vit_base_patch16_224", num_classes=10)


def _scores(names: Mapping[str, Any]) -> spt.Sensitivity:
    return spt.measure_sensitivity(_base(names), names["batches"], num_samples=4)


# A page may use these without making them; it gets them anew in each block until it makes its own.
MADE: Mapping[str, Callable[[Mapping[str, Any]], object]] = {"model": _base, "sensitivity": _scores}


def _write_task_file(path: Path) -> None:
    tuned = timm.create_model("vit_base_patch16_224")
    scores = {n: torch.rand_like(p) for n, p in tuned.named_parameters() if "blocks" in n}
    sensitivity = spt.Sensitivity.from_tensors(scores, num_samples=1)
    spt.save_delta(spt.apply(tuned, spt.allocate(sensitivity, 0.01, rank=1)), path)


def _write_weights(path: Path) -> None:
    save_file(timm.create_model("vit_base_patch16_224").state_dict(), path)


def _write_groups(root: Path) -> None:
    write_task(root / "flowers" / "wild", train=2, test=1)


def _write_vtab(root: Path) -> None:
    for task in VTAB:
        write_vtab(root, task, labels=2)


# as the pages call them
FILES: Mapping[str, Callable[[Path], object]] = {
    "flowers.safetensors": _write_task_file,
    "pets.safetensors": _write_task_file,
    "vit.safetensors": _write_weights,
    "photos": lambda root: write_task(root, train=2, test=1),
    "own": _write_groups,
    "fgvc": write_fgvc,
    "vtab-1k": _write_vtab,
}
