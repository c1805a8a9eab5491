"""One whole training step of ViT-B/16, optimizer included, beside full tuning and its peers.

Every row but full tuning trains the number of parameters that a LoRA of rank 16 on `qkv` has,
0.69 % of the backbone, the share of the paper's Table 7.
"""

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
from spt_kernels.costs.synthetic import skewed_sensitivity

from .contest import hold, turn

BATCH, CLASSES = 8, 100
BUDGET = 12 * 16 * (768 + 2304)  # LoRA of rank 16 on the fused qkv of 12 blocks
MATRICES = r"blocks\.\d+\.(attn|mlp)\.(qkv|proj|fc1|fc2)"
MATRIX_NUMEL = 12 * 12 * 768 * 768
SHIRA_RANK = 4  # its count is rank × (rows + columns): the budget exactly, over these matrices
UNSTRUCTURED = "SPT, unstructured only"
FULL, LORA = "full fine-tuning", "PEFT LoRA, rank 16 on qkv"


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", num_classes=CLASSES)


def stepper(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> Callable[[], Tensor]:
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


def tuned(base: nn.Module, structured: str | None, device: torch.device) -> Callable[[], Tensor]:
    model = copy.deepcopy(base)
    plan = spt.allocate(skewed_sensitivity(model), BUDGET, structured)
    model = spt.apply(model, plan).to(device)
    return stepper(model, spt.SparseAdamW(spt.param_groups(model), lr=1e-3), device)


def full(base: nn.Module, device: torch.device) -> Callable[[], Tensor]:
    model = copy.deepcopy(base).to(device)
    return stepper(model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), device)


def peft_tuned(base: nn.Module, config: Any, device: torch.device) -> Callable[[], Tensor]:
    import peft

    model = peft.get_peft_model(copy.deepcopy(base), config).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    head = sum(p.numel() for p in base.get_submodule("head").parameters())
    count = sum(p.numel() for p in trained) - head
    assert abs(count - BUDGET) <= 0.01 * BUDGET, count  # the rows are only comparable then
    return stepper(model, torch.optim.AdamW(trained, lr=1e-3), device)


def peers(base: nn.Module, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Whatever of PEFT's is installed and trains as many parameters."""
    peft = pytest.importorskip("peft")
    head = {"modules_to_save": ["head"]}
    lora = peft.LoraConfig(r=16, target_modules=["qkv"], **head)
    rows = {LORA: peft_tuned(base, lora, device)}
    shira = peft.ShiraConfig(r=SHIRA_RANK, target_modules=MATRICES, **head)
    rows["PEFT SHiRA, all matrices"] = peft_tuned(base, shira, device)
    if hasattr(peft, "SupertuningConfig"):
        supertuning = peft.SupertuningConfig(
            sparsity=1 - BUDGET / MATRIX_NUMEL, target_modules=MATRICES, **head
        )
        rows["PEFT Super-Tuning, all matrices"] = peft_tuned(base, supertuning, device)
    return rows


def test_training_step_vit_b(benchmark: Any, base: nn.Module, device: torch.device) -> None:
    targets = {FULL: 0.75, LORA: 1.0}
    contest = hold(
        benchmark,
        f"training step: ViT-B/16, batch {BATCH}, fp32, {BUDGET:,} parameters and the head",
        {
            "SPT-LoRA": tuned(base, "lora", device),
            UNSTRUCTURED: tuned(base, None, device),
            FULL: full(base, device),
            **peers(base, device),
        },
        rounds=5,
        targets=targets,
    )
    turn(contest, UNSTRUCTURED, targets)
