"""Your own training loop, on a folder of images with a folder per class.

python examples/own_loop.py photos/train --model vit_base_patch16_224 --output task.safetensors
"""

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData, ImageFolder

import spt_kernels as spt

SMOKE = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}


def main(arguments: list[str] | None = None) -> None:
    """Measure, plan, tune, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, nargs="?", default="photos/train")
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--output", type=Path, default=Path("task.safetensors"))
    parser.add_argument("--smoke", action="store_true", help="tiny and random, to see it run")
    args = parser.parse_args(arguments)
    if args.smoke:
        data, classes = FakeData(12, (3, 32, 32), 3), ["a", "b", "c"]
    else:
        data = ImageFolder(args.images)
        classes = data.classes

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SMOKE if args.smoke else {"pretrained": True}
    model = timm.create_model(args.model, num_classes=len(classes), **shape).to(device)
    config = timm.data.resolve_data_config(shape, model=model)
    data.transform = timm.data.create_transform(**config)  # scores are of images as tested
    sensitivity = spt.measure_sensitivity(model, DataLoader(data, 16, shuffle=True))
    spt.apply(model, spt.allocate(sensitivity, budget=0.05 if args.smoke else 0.005))

    data.transform = timm.data.create_transform(**config, is_training=True)
    loader = DataLoader(data, 4 if args.smoke else 64, shuffle=True, drop_last=True)
    optimizer = spt.SparseAdamW(spt.param_groups(model, weight_decay=1e-4), lr=1e-3)
    epochs = 1 if args.smoke else 100
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    n_bytes = spt.save_delta(model, args.output, metadata={"classes": classes})
    print(f"{args.output}: {n_bytes:,} bytes")


if __name__ == "__main__":
    main()
