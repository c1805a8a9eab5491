"""Trains the base model of the demo, whose weights the package brings: `python -m bench.demo_base`.

It learns the handwritten digits 0 to 4, upright and in three other turns, so that there is more to
see than five forms: 20 classes, of which the shipped head keeps the five upright ones. Digits 5 to
9 are never shown, nor are the test images of 0 to 4. One thread and one seed: on one machine and
version of torch the file is the same to the byte, on another it is as good and not the same.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from spt_kernels.files.atomic import write_atomically
from spt_kernels.finetuning.base.models import ModelSource, build
from spt_kernels.finetuning.demo import (
    ARCHITECTURE,
    BASE,
    OLD,
    OLD_TEST_SHARE,
    SHAPE,
    one_thread,
)
from spt_kernels.finetuning.images.digits import split_digits

STEPS, BATCH, LR, WARMUP, WEIGHT_DECAY = 5000, 128, 1e-3, 250, 0.05
TURNS = 4
# How far an image is changed at random: radians, logarithms of scales, shares of the side
ROTATION, SCALE, STRETCH, SHEAR, SHIFT, NOISE = math.radians(20), 0.2, 0.15, 0.3, 0.125, 0.1


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Images `[n, 1, 8, 8]` in -1 to 1, as the demo reads them, and labels, of the old digits."""
    images, labels = [], []
    for own, digit, pixels in split_digits(OLD, OLD_TEST_SHARE):
        if own == split:
            images.append((torch.from_numpy(pixels)[:, None].float() / 255 - 0.5) / 0.5)
            labels += [digit] * len(pixels)
    return torch.cat(images), torch.tensor(labels)


def turned(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """All images in all turns; upright ones keep their label."""
    every = [torch.rot90(images, turn, (2, 3)) for turn in range(TURNS)]
    return torch.cat(every), torch.cat([labels + len(OLD) * turn for turn in range(TURNS)])


def varied(images: Tensor) -> Tensor:
    """Each image rotated, scaled, sheared and shifted a little, with some noise."""

    def drawn(most: float, *shape: int) -> Tensor:
        return most * (2 * torch.rand(len(images), *shape) - 1)

    angle, shear = drawn(ROTATION), drawn(SHEAR)
    height = drawn(SCALE).exp()
    width = height * drawn(STRETCH).exp()
    cos, sin = angle.cos(), angle.sin()
    rows = [cos * width, shear * cos - sin * height, sin * width, cos * height]
    matrix = torch.stack(rows, 1).view(-1, 2, 2)
    moved = torch.cat((matrix, 2 * drawn(SHIFT, 2, 1)), 2)
    grid = F.affine_grid(moved, list(images.shape), align_corners=False)
    # what lies outside is black, which is -1
    seen = F.grid_sample(images + 1, grid, align_corners=False) - 1
    return seen + NOISE * torch.randn_like(seen)


def train(steps: int = STEPS) -> nn.Module:
    """The model of 20 classes after so many steps."""
    source = ModelSource(ARCHITECTURE, SHAPE)
    model = build(source, TURNS * len(OLD), drop_path=0.1).model.train()
    images, labels = turned(*digits("train"))
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY)

    def factor(step: int) -> float:
        return min(1, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    began, total = time.monotonic(), 0.0
    for step in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        scores = model(varied(images[chosen]))
        loss = F.cross_entropy(scores, labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        total += loss.item()
        if (step + 1) % 250 == 0:
            spent = time.monotonic() - began
            print(f"step {step + 1}/{steps}, loss {total / 250:.3f}, {spent:.0f} s", flush=True)
            total = 0.0
    return model.eval()


def shipped(model: nn.Module) -> dict[str, Tensor]:
    """Its weights in half precision, the head that of the upright digits."""
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    head = {name: state[name][: len(OLD)].clone() for name in ("head.weight", "head.bias")}
    return state | head


def main() -> None:
    """Train and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=BASE, help=f"[{BASE}]")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"[{STEPS}]")
    given = parser.parse_args()
    with one_thread():
        model = train(given.steps)
        images, labels = digits("test")
        with torch.no_grad():
            right = (model(images)[:, : len(OLD)].argmax(1) == labels).float().mean()
    write_atomically(given.output, save(shipped(model)))
    print(f"{100 * right:.1f} % of the test images; written to {given.output}")


if __name__ == "__main__":
    main()
