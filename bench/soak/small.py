"""A small tuned model and a small run, which the checks save, damage, kill and switch."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import VisionTransformer
from torch import nn

import spt_kernels as spt
from spt_kernels.finetuning import FinetuneJob, ImageSource, Method, ModelSource, Recipe

_SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}


def base_model() -> nn.Module:
    """The same one each time."""
    torch.manual_seed(0)
    return VisionTransformer(**_SIZES, num_classes=5)


def random_plan(model: nn.Module, generator: torch.Generator, budget: int = 900) -> spt.Plan:
    """Of made-up scores, a few of which are far above the others."""
    named = {n: p for n, p in model.named_parameters() if not n.startswith("head")}
    scores = {n: torch.rand(p.shape, generator=generator) ** 8 for n, p in named.items()}
    sensitivity = spt.Sensitivity.from_tensors(scores, 1, head=("head.weight", "head.bias"))
    return spt.allocate(sensitivity, budget, "lora", rank=1)


def tuned_model(seed: int, budget: int = 900) -> nn.Module:
    """With deltas, LoRA, biases and a head of its own, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    model = base_model()
    spt.apply(model, random_plan(model, generator, budget))
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=0.01)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return model


def job_in(place: Path) -> FinetuneJob:
    """A run of seconds, on images of noise in two colours and weights that are written there."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 16), ("test", 4)):
        for channel, name in enumerate(("red", "green")):
            folder = place / "images" / split / name
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = torch.randint(128, (16, 16, 3), generator=generator, dtype=torch.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels.numpy()).save(folder / f"{n}.png")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **_SIZES)
    save_file(model.state_dict(), place / "base.safetensors")
    return FinetuneJob(
        ModelSource("vit_tiny_patch16_224", _SIZES, str(place / "base.safetensors")),
        ImageSource(str(place / "images")),
        Method("spt-lora", 700, 1, 16),
        Recipe(epochs=4, batch_size=4),
    )
