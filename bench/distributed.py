"""What sharing costs: bytes that a process sends, and time, against the number of processes.

`python -m bench.distributed` prints a Markdown table. Bytes are counted where a collective is
called, as what a ring sends, and are those of any machine. Times are of processes of one thread
that share this machine's cores, as ratios to one process in the same go: they tell what sharing
costs beside the work where there are cores for all, and nothing where there are not.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import spt_kernels as spt
from spt_kernels.distributed import Processes
from spt_kernels.ops import shared_top_tau
from spt_kernels.sensitivity import skewed_sensitivity
from spt_kernels.step import TrainingStep
from spt_kernels.step.shared_step import SharedStep

from .markdown import markdown

SIZES = (1, 2, 4)
MODEL, IMAGE, BATCH, BUDGET, SAMPLES = "vit_tiny_patch16_224", 96, 16, 0.005, 16
WARM_UP, STEPS = 2, 5

# what a process sends in a ring, as a share of the bytes of the larger of what goes in and out
_SHARES: dict[str, Callable[[int], float]] = {
    "allreduce_": lambda n: 2 * (n - 1) / n,
    "_allgather_base_": lambda n: (n - 1) / n,
    "_reduce_scatter_base_": lambda n: (n - 1) / n,
    "alltoall_base_": lambda n: (n - 1) / n,
}
_OF_OBJECTS = ("allgather_", "broadcast_", "barrier")  # a few hundred bytes each


class Sent(TorchDispatchMode):
    """Counts the bytes that collectives send while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2]
            if name not in _OF_OBJECTS:
                sizes = [
                    sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, torch.Tensor))
                    for arg in args
                ]
                self.n_bytes += _SHARES[name](dist.get_world_size()) * max(sizes)
        return func(*args, **(kwargs or {}))


def tuned() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(MODEL, img_size=IMAGE, num_classes=10)
    plan = spt.allocate(skewed_sensitivity(model), BUDGET, dropout=0.0)
    return spt.apply(model, plan).train()


def own_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, IMAGE, IMAGE, generator=generator)
    labels = torch.arange(BATCH) % 10
    own = slice(dist.get_rank(), None, dist.get_world_size())
    return images[own], labels[own]


def optimizer_of(model: nn.Module) -> spt.SparseAdamW:
    return spt.SparseAdamW(spt.param_groups(model))


def as_finetune() -> Callable[[], Any]:
    model, batch = tuned(), own_batch()
    arguments = model, F.cross_entropy, optimizer_of(model)
    processes = Processes.of(dist.group.WORLD)
    alone = processes.size == 1
    step = TrainingStep(*arguments) if alone else SharedStep(*arguments, processes=processes)
    return lambda: step(*batch)


def as_ddp() -> Callable[[], Any]:
    model, batch = tuned(), own_batch()
    step = TrainingStep(DistributedDataParallel(model), F.cross_entropy, optimizer_of(model))
    return lambda: step(*batch)


def as_fsdp() -> Callable[[], Any]:
    model, batch = tuned(), own_batch()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    step = TrainingStep(model, F.cross_entropy, optimizer_of(model))
    return lambda: step(*batch)


def sensitivity() -> Callable[[], Any]:
    torch.manual_seed(0)
    model, batch = timm.create_model(MODEL, img_size=IMAGE, num_classes=10), own_batch()
    nn.init.trunc_normal_(model.get_classifier().weight, std=0.02)
    return lambda: spt.measure_sensitivity(
        model, [batch], num_samples=SAMPLES, progress=False, group=dist.group.WORLD
    )


def top_tau() -> Callable[[], Any]:
    scores = [*skewed_sensitivity(timm.create_model(MODEL, img_size=IMAGE)).values()]
    n, rank = dist.get_world_size(), dist.get_rank()
    parts = [score.reshape(-1).tensor_split(n)[rank].clone() for score in scores]
    return lambda: shared_top_tau(parts, 27_000, group=dist.group.WORLD)


WAYS: dict[str, Callable[[], Callable[[], Any]]] = {
    "step of `finetune`": as_finetune,
    "step under DistributedDataParallel": as_ddp,
    "step under `fully_shard`": as_fsdp,
    f"`measure_sensitivity`, {SAMPLES} samples": sensitivity,
    "`shared_top_tau`": top_tau,
}


def measured(make: Callable[[], Callable[[], Any]]) -> dict[str, float]:
    run = make()
    for _ in range(WARM_UP):
        run()
    with Sent() as sent:
        run()
    dist.barrier()
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return {"bytes": sent.n_bytes, "ms": 1e3 * sorted(times)[STEPS // 2]}


def main() -> None:
    with tempfile.TemporaryDirectory() as place, one_thread():
        found = {size: measured_in(size, Path(place)) for size in SIZES}
    rows = []
    for name in WAYS:
        alone = found[SIZES[0]][name]["ms"]
        cells = [
            f"{found[n][name]['bytes'] / 1e6:,.2f} MB, {found[n][name]['ms'] / alone:.2f}"
            for n in SIZES
        ]
        rows.append((name, *cells))
    print(f"{MODEL} at {IMAGE} px, a batch of {BATCH} in all, {100 * BUDGET} % trained.")
    machine = f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, gloo"
    print(f"{machine}, one thread a process.\n")
    print(markdown(("sent by each process, time", *(f"{n} processes" for n in SIZES)), rows))


def measured_in(size: int, place: Path) -> dict[str, dict[str, float]]:
    """What the first of so many processes measures."""
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            store = dist.FileStore(str(place / f"store-{size}"), size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
            found = {name: measured(make) for name, make in WAYS.items()}
            if rank == 0:
                (place / f"{size}.json").write_text(json.dumps(found))
            dist.barrier()
            os._exit(0)
        children.append(child)
    for child in children:
        if os.waitpid(child, 0)[1]:
            raise SystemExit("a process failed")
    return json.loads((place / f"{size}.json").read_text())


@contextmanager
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


if __name__ == "__main__":
    main()
