"""Small image folders and base weights that the tests write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from spt_kernels.finetuning.base.models import ModelSource, build

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}


def write_images(
    root: Path, counts: dict[str, int], *, size: tuple[int, int] = (16, 16), seed: int = 0
) -> Path:
    """Write `counts[name]` noisy PNGs as `root/<name>/*.png`, each class in a colour of its own."""
    random = np.random.default_rng(seed)
    for label, (name, count) in enumerate(counts.items()):
        folder = root / name
        folder.mkdir(parents=True)
        for place in range(count):
            pixels = random.integers(0, 160, (*size, 3), dtype=np.uint8)
            pixels[..., label % 3] += 80
            Image.fromarray(pixels).save(folder / f"{place:03}.png")
    return root


def write_task(root: Path, train: int = 12, test: int = 6) -> Path:
    """Write an image folder of three classes with `train/` and `test/`."""
    names = ("blue", "green", "red")
    write_images(root / "train", dict.fromkeys(names, train))
    write_images(root / "test", dict.fromkeys(names, test), seed=1)
    return root


def write_weights(path: Path, num_classes: int = 5) -> ModelSource:
    """Write the weights of a tiny ViT, with a head of `num_classes`, and say how to build it."""
    model = build(ModelSource("vit_tiny_patch16_224", TINY), num_classes, seed=3).model
    with torch.no_grad():  # timm starts biases and norms at constants
        generator = torch.Generator().manual_seed(4)
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_file(model.state_dict(), path)
    return ModelSource("vit_tiny_patch16_224", TINY, str(path))
