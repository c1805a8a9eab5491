"""A ViT of transformers, tuned by its Trainer.

python examples/transformers_trainer.py google/vit-base-patch16-224-in21k photos/train
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import FakeData, ImageFolder
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import spt_kernels as spt

SMOKE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "num_labels": 3}


def collate(rows: list) -> dict[str, torch.Tensor]:
    """What the model takes."""
    images, labels = zip(*rows, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def main(arguments: list[str] | None = None) -> None:
    """Measure, plan, tune, and leave the training to the Trainer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="google/vit-base-patch16-224-in21k")
    parser.add_argument("images", type=Path, nargs="?", default="photos/train")
    parser.add_argument("--output", type=Path, default=Path("task.safetensors"))
    parser.add_argument("--smoke", action="store_true", help="tiny and random, to see it run")
    args = parser.parse_args(arguments)
    if args.smoke:
        data = FakeData(12, (3, 32, 32), 3)
        model = ViTForImageClassification(ViTConfig(**SMOKE, image_size=32, patch_size=8))
    else:
        data = ImageFolder(args.images)
        model = ViTForImageClassification.from_pretrained(args.model, num_labels=len(data.classes))
    size = (model.config.image_size,) * 2
    to_pixels = (transforms.ToTensor(), transforms.Normalize(0.5, 0.5))
    data.transform = transforms.Compose([transforms.Resize(size), *to_pixels])

    batches = DataLoader(data, 16, shuffle=True, collate_fn=collate)
    sensitivity = spt.measure_sensitivity(model, batches)
    spt.apply(model, spt.allocate(sensitivity, budget=0.05 if args.smoke else 0.005))
    optimizer = spt.SparseAdamW(spt.param_groups(model, weight_decay=1e-4), lr=1e-3)
    how = TrainingArguments(num_train_epochs=1 if args.smoke else 100, save_strategy="no")
    Trainer(model, how, collate, data, optimizers=(optimizer, None)).train()
    print(f"{args.output}: {spt.save_delta(model, args.output):,} bytes")


if __name__ == "__main__":
    main()
