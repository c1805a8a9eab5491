"""Trains the evidence's small ViT with exact and with approximate gradients, seed by seed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from bench.evidence.contender import Run
from bench.evidence.run import job_of
from bench.evidence.setting import VIT
from bench.evidence.tasks import write_tasks
from bench.evidence.weights import weights_file
from spt_kernels.benchmarks import folder_tasks
from spt_kernels.benchmarks.shared_sensitivity import give, store_of, take
from spt_kernels.benchmarks.task import BenchmarkTask
from spt_kernels.costs.machine import commit, describe
from spt_kernels.finetuning import finetune
from spt_kernels.finetuning.folder.run_folder import RunFolder

from .ways import ACCURACY, EXACT, WAYS

TASKS = ("four-classes", "rotation")  # of VTAB's natural and structured kinds
CONTENDER = "spt-lora"
# the least approximate, and everything at once
TRAINED_WAYS = (EXACT, "GELU 2 bits, LayerNorm", "GELU 8 bits")
EPOCHS = 2  # for time: of the evidence's five


@dataclass(frozen=True)
class Trained:
    """One run.

    Attributes:
        task: of the evidence.
        way: of `WAYS`.
        seed: of everything drawn.
        test_accuracy: top-1 in 0 to 1, after the last epoch.
        train_loss: of the last epoch.
        seconds: of the run.
        machine: processor.
        versions: of what was run.
        commit: of this repository.
    """

    task: str
    way: str
    seed: int
    test_accuracy: float
    train_loss: float
    seconds: float
    machine: str
    versions: dict[str, str]
    commit: str


def read() -> list[Trained]:
    """Every run so far."""
    lines = ACCURACY.read_text().splitlines() if ACCURACY.is_file() else []
    return [Trained(**json.loads(line)) for line in lines]


def run_missing(data: Path, work: Path, seeds: Sequence[int] = VIT.seeds) -> None:
    """Do every run that has no line yet; all ways of a task and seed start from one sensitivity."""
    torch.set_num_threads(1)
    write_tasks(data, work / "tasks")
    weights = weights_file(VIT.model.weights or "", data, work / "weights")
    tasks = {task.name: task for task in folder_tasks(work / "tasks", TASKS)}
    done = {(run.task, run.way, run.seed) for run in read()}
    for seed, way, name in itertools.product(seeds, TRAINED_WAYS, TASKS):
        if (name, way, seed) in done:
            continue
        run = _run(tasks[name], way, seed, weights, work / "approximation")
        with ACCURACY.open("a") as file:  # other processes may be at other seeds
            file.write(json.dumps(asdict(run)) + "\n")
        print(f"{name}, {way}, seed {seed}: {100 * run.test_accuracy:.1f} %", flush=True)


def _run(task: BenchmarkTask, way: str, seed: int, weights: Path, work: Path) -> Trained:
    job = job_of(VIT, Run(task.name, CONTENDER, seed), task, weights)
    job = replace(job, recipe=replace(job.recipe, epochs=EPOCHS, approximate=WAYS[way]))
    folder = RunFolder(work / f"{task.name}.{way.replace(' ', '-')}.{seed}")
    store = store_of(job, work / task.name)
    assert store is not None  # it chooses by sensitivity
    take(store, folder)
    result = finetune(job, folder.path, resume=True, device="cpu")
    give(folder, store)
    place = describe(torch.device("cpu"))
    return Trained(
        *(task.name, way, seed, result["test_accuracy"], result["train_loss"]),
        *(result["seconds"], place.processor, dict(place.versions), commit()),
    )
