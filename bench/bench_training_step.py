"""One whole training step of ViT-B/16, optimizer included, beside full tuning and PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt
from spt_kernels.anatomy import candidate_names, describe

from .contest import hold

BATCH, BUDGET, CLASSES = 8, 400_000, 100


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", num_classes=CLASSES)


def skewed_sensitivity(model: nn.Module) -> spt.Sensitivity:
    """Scores that differ between matrices, rows and columns, as measured ones do."""
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    info = describe(model)
    scores = {}
    for name in candidate_names(model):
        shape = parameters[name].shape
        score = torch.rand(shape, generator=generator).square()
        for axis in range(len(shape)):
            sizes = [1] * len(shape)
            sizes[axis] = shape[axis]
            score *= torch.randn(sizes, generator=generator).exp()
        scores[name] = score
    return spt.Sensitivity.from_tensors(
        scores, num_samples=1, info={name: info[name] for name in scores}
    )


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> Callable:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, 224, 224, generator=generator).to(device)
    target = torch.randint(CLASSES, (BATCH,), generator=generator).to(device)
    model.train()

    def step() -> Tensor:
        loss = F.cross_entropy(model(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def tuned(base: nn.Module, structured: str | None, device: torch.device) -> Callable:
    model = copy.deepcopy(base)
    plan = spt.allocate(skewed_sensitivity(model), BUDGET, structured)
    model = spt.apply(model, plan).to(device)
    return stepper(model, spt.SparseAdamW(spt.param_groups(model), lr=1e-3), device)


def full(base: nn.Module, device: torch.device) -> Callable:
    model = copy.deepcopy(base).to(device)
    return stepper(model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), device)


def peft_tuned(base: nn.Module, config: Any, device: torch.device) -> Callable:
    import peft

    model = peft.get_peft_model(copy.deepcopy(base), config).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    return stepper(model, torch.optim.AdamW(trained, lr=1e-3), device)


def test_training_step_vit_b(benchmark: Any, base: nn.Module, device: torch.device) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=16, target_modules=["qkv"], modules_to_save=["head"])
    matrices = r"blocks\.\d+\.(attn|mlp)\.(qkv|proj|fc1|fc2)"
    shira = peft.ShiraConfig(r=2, target_modules=matrices, modules_to_save=["head"])
    hold(
        benchmark,
        f"training step: ViT-B/16, batch {BATCH}, fp32, {BUDGET:,} parameters besides the head",
        {
            "SPT-LoRA": tuned(base, "lora", device),
            "SPT, unstructured only": tuned(base, None, device),
            "full fine-tuning": full(base, device),
            "PEFT LoRA, rank 16 on qkv": peft_tuned(base, lora, device),
            "PEFT SHiRA, all matrices": peft_tuned(base, shira, device),
        },
        rounds=5,
    )
