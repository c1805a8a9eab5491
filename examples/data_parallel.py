"""Several GPUs, or processes on a CPU, by torchrun and DistributedDataParallel.

torchrun --nproc-per-node 4 examples/data_parallel.py photos/train
"""

import argparse
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import FakeData, ImageFolder

import spt_kernels as spt

SMOKE = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3}


def main(arguments: list[str] | None = None) -> None:
    """Each process measures and trains on a share of the images, by one plan; the first saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, nargs="?", default="photos/train")
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--output", type=Path, default=Path("task.safetensors"))
    parser.add_argument("--smoke", action="store_true", help="tiny and random, to see it run")
    args = parser.parse_args(arguments)
    dist.init_process_group()  # NCCL between GPUs, Gloo between CPUs
    data = FakeData(12, (3, 32, 32), 3) if args.smoke else ImageFolder(args.images)
    device = f"cuda:{dist.get_node_local_rank()}" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)  # the same head in every process
    shape = SMOKE if args.smoke else {"pretrained": True, "num_classes": len(data.classes)}
    model = timm.create_model(args.model, **shape).to(device)
    config = timm.data.resolve_data_config(shape, model=model)
    data.transform = timm.data.create_transform(**config)
    samples = DataLoader(data, 16, sampler=DistributedSampler(data))
    sensitivity = spt.measure_sensitivity(model, samples, group=dist.group.WORLD)
    plan = spt.allocate(sensitivity, budget=0.05 if args.smoke else 0.005)
    parallel = DistributedDataParallel(spt.apply(model, plan).train())

    optimizer = spt.SparseAdamW(spt.param_groups(model, weight_decay=1e-4), lr=1e-3)
    sampler = DistributedSampler(data, drop_last=True)
    loader = DataLoader(data, 4 if args.smoke else 16, sampler=sampler)
    for epoch in range(1 if args.smoke else 100):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            F.cross_entropy(parallel(images.to(device)), labels.to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"{args.output}: {spt.save_delta(model, args.output):,} bytes")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
