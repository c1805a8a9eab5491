"""Resident memory of real training steps on the CPU beside what is accounted for them.

`python -m bench.real_memory` prints one table.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn
from torch.nn import functional as F

from spt_kernels.costs import CostSetting
from spt_kernels.costs.measure import tune_for_costs
from spt_kernels.memory import estimate_memory

from .quantizers import QUANTIZERS

CLASSES, STEPS, THREADS = 100, 2, 2
TOLERANCE = 0.05  # of what is accounted


@dataclass(frozen=True)
class RealStep:
    """A step to run: which model, tuned as which row of the cost table, on how many images."""

    model: str
    method: str
    batch: int
    checkpointing: bool = False
    training: bool = True
    quantized: str = ""

    def __str__(self) -> str:
        kind = ", checkpointing" if self.checkpointing else "" if self.training else ", inference"
        kind = f", {self.quantized}{kind}" if self.quantized else kind
        return f"{self.model.partition('_patch')[0]}, {self.method}{kind}, batch {self.batch}"


VIT, SWIN = "vit_small_patch16_224", "swin_tiny_patch4_window7_224"
VIT_B = "vit_base_patch16_224"
CONVNEXT, RESNET = "convnext_tiny", "resnet50"
STEPS_TO_RUN = {
    str(step): step
    for step in (
        RealStep(VIT, "full", 8),
        RealStep(VIT, "peft-lora-16", 8),
        RealStep(VIT, "peft-shira", 8),
        RealStep(VIT, "spt-lora", 8),
        RealStep(VIT, "spt-adapter", 8, checkpointing=True),
        RealStep(VIT, "full", 32, training=False),
        RealStep(SWIN, "full", 4),
        RealStep(SWIN, "spt-unstructured", 4),
        RealStep(CONVNEXT, "spt-lora", 4),
        RealStep(RESNET, "full", 4),
        RealStep(VIT_B, "spt-lora", 8),
        *(RealStep(VIT_B, "spt-lora", 8, quantized=n) for n in ("int8", "nf4") if n in QUANTIZERS),
    )
}

# Every tensor is a mapping of its own, given back when it dies: what is resident is what is alive.
# Left alone, glibc raises the threshold to 32 MiB and keeps what is freed below it, in holes.
OWN_MAPPINGS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Comparison:
    """Peaks in MiB: resident beyond what the process had before its model, and accounted."""

    real_mib: float
    accounted_mib: float

    @property
    def departure(self) -> float:
        """How much more was resident, as a share of what is accounted."""
        return self.real_mib / self.accounted_mib - 1

    def __str__(self) -> str:
        missed = "" if abs(self.departure) <= TOLERANCE else ", missed"
        return f"{self.real_mib:,.1f} / {self.accounted_mib:,.1f}, {self.departure:+.1%}{missed}"


def compare(
    names: Iterable[str], environment: Mapping[str, str] = OWN_MAPPINGS
) -> Iterator[tuple[str, Comparison]]:
    """Run some of `STEPS_TO_RUN`, each in a process of its own.

    The processes are forked from one that has imported everything and computed nothing.
    """
    steps = {name: STEPS_TO_RUN[name] for name in names}
    peft = ["peft"] if any(step.method.startswith("peft") for step in steps.values()) else []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.real_memory", *peft])
    before = dict(os.environ)
    os.environ.update(environment)  # the allocator reads it when a program starts
    try:
        with context.Pool(1, maxtasksperchild=1) as pool:
            for name, step in steps.items():
                yield name, pool.apply(_measure, (step,))
    finally:
        os.environ.clear()
        os.environ.update(before)


def _measure(step: RealStep) -> Comparison:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    base = timm.create_model(step.model, num_classes=CLASSES)
    if step.quantized:
        base = QUANTIZERS[step.quantized](base)
    if step.checkpointing:
        base.set_grad_checkpointing(True)
    _run(_prepared(base, step), step, 1)  # loads libraries, starts threads, compiles kernels
    before = _settled_mib()
    model = _prepared(base, step)
    _settled_mib()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    _run(model, step, step.batch)
    real = _status_mib("VmHWM") - before
    accounted = estimate_memory(
        model,
        (step.batch, 3, 224, 224),
        training=step.training,
        checkpointing=step.checkpointing,
        device="cpu",
    )
    return Comparison(real, accounted.peak_bytes / 2**20)


def _prepared(base: nn.Module, step: RealStep) -> nn.Module:
    """A tuned copy of `base`, which stays."""
    setting = CostSetting(model=step.model, num_classes=CLASSES, rounds=0)
    method, shape = setting.method(step.method, base), setting.image_shape(base)
    return tune_for_costs(copy.deepcopy(base), method, shape).model


def _run(model: nn.Module, step: RealStep, batch: int) -> None:
    images, target = torch.randn(batch, 3, 224, 224), torch.zeros(batch, dtype=torch.int64)
    if not step.training:
        with torch.no_grad():
            model.eval()(images)
        return
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), target).backward()
        optimizer.step()


def _settled_mib() -> float:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status_mib("VmRSS")


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the rows that are asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", choices=STEPS_TO_RUN, action="append")
    parser.add_argument(
        "--default-allocator", action="store_true", help="let glibc keep what is freed"
    )
    chosen = parser.parse_args(arguments)
    print(f"peak in MiB, fp32, {THREADS} threads, torch {torch.__version__}: resident / accounted")
    environment = {} if chosen.default_allocator else OWN_MAPPINGS
    for name, found in compare(chosen.row or STEPS_TO_RUN, environment):
        print(f"  {name:<52}{found}", flush=True)


if __name__ == "__main__":
    main()
