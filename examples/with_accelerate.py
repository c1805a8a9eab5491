"""A loop under accelerate: `accelerate launch` decides where and in which precision it runs.

accelerate launch --mixed_precision bf16 examples/with_accelerate.py photos/train
"""

import argparse
from pathlib import Path

import timm
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData, ImageFolder

import spt_kernels as spt

SMOKE = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3}


def main(arguments: list[str] | None = None) -> None:
    """Tune before `prepare`, which holds on to the parameters it is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, nargs="?", default="photos/train")
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--output", type=Path, default=Path("task.safetensors"))
    parser.add_argument("--smoke", action="store_true", help="tiny and random, to see it run")
    args = parser.parse_args(arguments)
    data = FakeData(12, (3, 32, 32), 3) if args.smoke else ImageFolder(args.images)
    accelerator = Accelerator()
    set_seed(0)  # the same head in every process
    shape = SMOKE if args.smoke else {"pretrained": True, "num_classes": len(data.classes)}
    model = timm.create_model(args.model, **shape).to(accelerator.device)
    config = timm.data.resolve_data_config(shape, model=model)
    data.transform = timm.data.create_transform(**config)

    plan = args.output.with_suffix(".plan")
    if accelerator.is_main_process:  # one measures, all train by its plan
        with accelerator.autocast():
            sensitivity = spt.measure_sensitivity(model, DataLoader(data, 16, shuffle=True))
        spt.allocate(sensitivity, budget=0.05 if args.smoke else 0.005).save(plan)
    accelerator.wait_for_everyone()
    tuned = spt.apply(model, spt.Plan.load(plan)).train()

    optimizer = spt.SparseAdamW(spt.param_groups(tuned, weight_decay=1e-4), lr=1e-3)
    loader = DataLoader(data, 4 if args.smoke else 64, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(tuned, optimizer, loader)
    for _ in range(1 if args.smoke else 100):
        for images, labels in loader:
            accelerator.backward(F.cross_entropy(model(images), labels))
            optimizer.step()
            optimizer.zero_grad()
    if accelerator.is_main_process:
        print(f"{args.output}: {spt.save_delta(tuned, args.output):,} bytes")


if __name__ == "__main__":
    main()
