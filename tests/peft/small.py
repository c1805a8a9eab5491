"""A small base model with plans for it, and a few steps of training."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.peft import SptConfig
from tests.models import tiny_batch, tiny_vit

IMAGES, LABELS = tiny_batch()


@functools.cache
def sensitivity() -> spt.Sensitivity:
    return spt.measure_sensitivity(tiny_vit(), [(IMAGES, LABELS)], num_samples=4)


def plan(budget: int = 1200, structured: str | None = "lora", rank: int = 2) -> spt.Plan:
    return spt.allocate(sensitivity(), budget, structured, rank, dropout=0.0)


def train(model: nn.Module, steps: int = 2, lr: float = 1e-2) -> nn.Module:
    """Steps of plain AdamW on whatever is trainable."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    step(model, torch.optim.AdamW(trainable, lr=lr), steps)
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    like = next(model.parameters())
    model.train()
    for _ in range(steps):
        F.cross_entropy(model(IMAGES.to(like.dtype)).float(), LABELS).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(IMAGES.to(next(model.parameters()).dtype))  # type: ignore[no-any-return]


def wrapped(structured: str | None = "lora", **options: Any) -> PeftModel:
    return get_peft_model(tiny_vit(), SptConfig(plan=plan(structured=structured), **options))


def same_parameters(model: nn.Module, other: nn.Module) -> bool:
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    return all(name == n and torch.equal(p, q) for (name, p), (n, q) in pairs)
