"""Resident memory of real training steps on the CPU beside what is accounted for them.

`python -m bench.real_memory` runs each method in a process of its own and prints one table.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import nn
from torch.nn import functional as F

from spt_kernels.memory import estimate_memory

from . import memory_methods as methods

ROWS = (
    *(methods.FULL, methods.LORA, methods.SHIRA),
    *(methods.SPT_LORA, methods.SPT_ADAPTER, methods.UNSTRUCTURED),
)
MODEL, CLASSES, STEPS, THREADS = "vit_base_patch16_224", 100, 3, 2

# Every tensor is a mapping of its own, given back when it dies: what is resident is what is alive.
# Left alone, glibc raises the threshold to 32 MiB and keeps what is freed below it, in holes.
OWN_MAPPINGS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def measure(row: str, batch: int) -> dict[str, float]:
    """Peak resident MiB of training steps beyond what the process had before there was a model."""
    import peft  # noqa: F401  # whose libraries no row is to be charged with

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    tiny = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, depth=1)
    _train(tiny, 1, 2)  # loads libraries, starts threads
    del tiny
    base = timm.create_model(MODEL, num_classes=CLASSES)
    prepare = methods.methods(base)[row]
    del base
    before = _settled_mib()

    base = timm.create_model(MODEL, num_classes=CLASSES)
    model = prepare(base)
    del base
    _settled_mib()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    _train(model, batch, STEPS)
    real = _status_mib("VmHWM") - before
    accounted = estimate_memory(methods.accountable(model), (batch, 3, 224, 224))
    return {"real_mib": real, "accounted_mib": accounted.peak_bytes / 2**20}


def _train(model: nn.Module, batch: int, steps: int) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    images, target = torch.randn(batch, 3, 224, 224), torch.zeros(batch, dtype=torch.int64)
    for _ in range(steps):
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


def _in_own_process(row: str, batch: int, environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.real_memory", "--row", row, "--batch", str(batch)]
    done = subprocess.run(
        command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one row in this process, or all of them in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--row", choices=ROWS, help="this one, in this process, as JSON")
    chosen = parser.parse_args(arguments)
    if chosen.row is not None:
        print(json.dumps(measure(chosen.row, chosen.batch)))
        return
    print(
        f"{MODEL}, batch {chosen.batch}, fp32, {THREADS} threads, torch {torch.__version__}: peak"
    )
    print("of a training step in MiB, resident beyond a process without a model, and accounted")
    print(f"  {'':<26}{'accounted':>11}{'own mappings':>14}{'':>9}{'glibc default':>15}")
    for row in ROWS:
        mapped, default = (
            _in_own_process(row, chosen.batch, environment) for environment in (OWN_MAPPINGS, {})
        )
        accounted = mapped["accounted_mib"]
        cells = [
            f"{found['real_mib']:>12,.1f} {found['real_mib'] / accounted - 1:>+8.1%}"
            for found in (mapped, default)
        ]
        print(f"  {row:<26}{accounted:>11,.1f}  {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
