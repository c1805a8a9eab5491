"""The same few steps of training anywhere: what a card must agree on with the CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt
from spt_kernels.sensitivity import skewed_sensitivity

CLASSES, BATCH, PIXELS, BUDGET = 5, 4, 32, 6000
KINDS = ("lora", "adapter", None)


def tiny_vit() -> nn.Module:
    """Two blocks of width 48, 17 tokens."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=PIXELS,
        patch_size=8,
        depth=2,
        embed_dim=48,
        num_classes=CLASSES,
    )
    return model


def make_batch() -> tuple[Tensor, Tensor]:
    """Noise and labels, on the CPU."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, PIXELS, PIXELS, generator=generator)
    return images, torch.randint(CLASSES, (BATCH,), generator=generator)


def train_and_save(
    base: nn.Module, kind: str | None, device: str, path: Path, steps: int = 2
) -> tuple[list[Tensor], nn.Module]:
    """Losses of a few steps, and the tuned model, whose task is in `path`."""
    model = copy.deepcopy(base).to(device)
    torch.manual_seed(2)  # of the structured modules, then of LoRA's dropout
    spt.apply(model, spt.allocate(skewed_sensitivity(base), BUDGET, kind))
    # Adam divides a gradient by its own size: what is rounding alone, as of k's bias, must stay so
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=1e-3, eps=1e-4)
    images, target = (part.to(device) for part in make_batch())
    model.train()
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    spt.save_delta(model, path)
    return losses, model
