"""A small folder in ADE20K's layout, and base weights, that the tests write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from spt_kernels.finetuning.base.models import ModelSource, build

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CLASSES = ("ground", "disc", "bar")
_COLOURS = np.array([(60, 120, 60), (200, 60, 40), (40, 60, 200)])


def write_scenes(root: Path, training: int = 6, validation: int = 3) -> Path:
    """Write scenes of 48 × 40: a disc and a bar in colours of their own, a border without label."""
    random = np.random.default_rng(0)
    for split, count in (("training", training), ("validation", validation)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for place in range(count):
            labels = _labels(random)
            pixels = _COLOURS[np.maximum(labels, 1) - 1] + random.integers(-20, 20, (40, 48, 3))
            name = f"ADE_{split[:5]}_{place + 1:08}"
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            image.save(root / "images" / split / f"{name}.jpg", quality=95)
            Image.fromarray(labels).save(root / "annotations" / split / f"{name}.png")
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    rows += [f"{i}\t0.3\t9\t3\t0\t{name}, thing" for i, name in enumerate(CLASSES, start=1)]
    (root / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    return root


def write_backbone(path: Path) -> ModelSource:
    """Write the weights of a tiny ViT for images of 24 × 24, and say how to build it."""
    model = build(ModelSource("vit_tiny_patch16_224", {**TINY, "img_size": 24}), 7, seed=3).model
    with torch.no_grad():  # timm starts biases and norms at constants
        generator = torch.Generator().manual_seed(4)
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_file(model.state_dict(), path)
    return ModelSource("vit_tiny_patch16_224", TINY, str(path))


def _labels(random: np.random.Generator) -> np.ndarray:
    rows, columns = np.mgrid[:40, :48]
    labels = np.ones((40, 48), dtype=np.uint8)
    y, x = random.integers(12, 28), random.integers(12, 36)
    labels[(rows - y) ** 2 + (columns - x) ** 2 < 81] = 2
    left = random.integers(0, 40)
    labels[:, left : left + 6] = 3
    labels[:2] = 0
    return labels
