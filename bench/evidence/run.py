"""Runs what is missing of the evidence: `python -m bench.evidence.run`.

It can be stopped at any moment and called again. Finished runs are lines in the files of
`bench/results/evidence` and are not repeated; one that was interrupted goes on from its last
checkpoint in `--work`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from spt_kernels.benchmarks import folder_tasks
from spt_kernels.benchmarks.lock import only_one
from spt_kernels.benchmarks.shared_sensitivity import give, store_of, take
from spt_kernels.benchmarks.task import BenchmarkTask
from spt_kernels.costs.machine import commit, describe
from spt_kernels.finetuning import FinetuneJob, finetune
from spt_kernels.finetuning.device import pick_device
from spt_kernels.finetuning.folder.run_folder import RunFolder
from spt_kernels.finetuning.preparation.measured import sensitivity_of
from spt_kernels.finetuning.progress import Silent
from spt_kernels.finetuning.run.setting import open_setting
from spt_kernels.sensitivity import Sensitivity

from .contender import Run, Suite
from .record import FOLDER, Record, keep, path_of, read
from .scores import BATCH, other_scores
from .setting import SUITES
from .tasks import data_folder, write_tasks
from .weights import weights_file

WORK = Path("runs") / "evidence"


def run_missing(
    suite: Suite,
    data: Path,
    work: Path,
    results: Path,
    first: int | None = None,
    device: str = "auto",
) -> int:
    """Do every run of `suite` that has no line in its file, and return how many this process did.

    Several processes may do so at the same time. A run whose loss is not finite is told, and left
    missing.

    Args:
        suite: what to run.
        data: the folder of the archives and weights.
        work: where tasks and unfinished runs are.
        results: the folder of the files of results.
        first: only the first so many seeds.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ValueError: data are missing, or the results are of another setting.
    """
    tasks = {task.name: task for task in folder_tasks(work / "tasks", suite.tasks)}
    weights = weights_file(suite.model.weights or "", data, work / "weights")
    path, done = path_of(suite, results), 0
    seeds, known = suite.seeds[:first], read(suite, path)
    for run in suite.runs():
        if run.seed not in seeds or run in known:
            continue
        with _mine(work / suite.name / run.folder) as folder:
            known = read(suite, path)  # another process may have done it
            if folder is None or run in known:
                continue
            what = f"{run.task}, {run.contender}, seed {run.seed}"
            try:
                record = do_run(suite, run, tasks[run.task], weights, folder, device)
            except FloatingPointError as error:
                print(f"{what}: {error}", file=sys.stderr, flush=True)
                continue
            keep(record, path)
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_name(f"{folder.name}.scores.safetensors").unlink(missing_ok=True)
            done += 1
            accuracy = f"{100 * record.test_accuracy:.1f} % in {record.seconds:.0f} s"
            print(f"{what}: {accuracy}", flush=True)
    return done


def do_run(
    suite: Suite, run: Run, task: BenchmarkTask, weights: Path, folder: Path, device: str
) -> Record:
    """Train and test once, in `folder`."""
    contender = suite.contender(run.contender)
    job = job_of(suite, run, task, weights)
    before = _cpu_seconds()
    store = store_of(job, folder.parent / "sensitivities" / run.task)
    if contender.scores != "per-sample":
        assert store is not None  # only a method that reads scores has others
        job = replace(job, sensitivity=str(_given(job, contender.scores, store, folder, device)))
    elif store is not None:
        take(store, RunFolder(folder))
    result = finetune(job, folder, resume=True, device=device)
    if store is not None and job.sensitivity is None:
        give(RunFolder(folder), store)
    place = describe(pick_device(device))
    return Record(
        suite.name,
        suite.digest_of(run.contender),
        run.task,
        run.contender,
        run.seed,
        contender.method.name,
        contender.method.budget,
        result["test_accuracy"],
        result["trained_parameters"],
        result["trained_parameters"] / result["backbone_parameters"],
        result["seconds"],
        round(_cpu_seconds() - before, 1),
        place.processor,
        place.threads,
        place.versions,
        commit(),
    )


def job_of(suite: Suite, run: Run, task: BenchmarkTask, weights: Path) -> FinetuneJob:
    """What `run` trains: on the training and validation images, as nothing is chosen by these."""
    return FinetuneJob(
        replace(suite.model, weights=str(weights.resolve())),
        task.final,
        suite.contender(run.contender).method,
        replace(suite.recipe, seed=run.seed),
        suite.form,
    )


def _given(job: FinetuneJob, kind: str, store: RunFolder, folder: Path, device: str) -> Path:
    """A file of other scores than the sensitivity, for the job's candidates."""
    path = folder.with_name(f"{folder.name}.scores.safetensors")
    if path.is_file():
        return path
    setting, silent = open_setting(job, device), Silent()
    if store["sensitivity"].is_file():
        measured = Sensitivity.load(store["sensitivity"])
    else:
        measured = sensitivity_of(setting, setting.training_batches(silent), silent)
    small = replace(job, recipe=replace(job.recipe, batch_size=BATCH))
    batches = replace(setting, job=small).training_batches(silent)
    model = setting.base.model.to(setting.device)
    made = other_scores(kind, measured, model, batches, job.recipe.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path)
    return path


@contextlib.contextmanager
def _mine(folder: Path) -> Iterator[Path | None]:
    """The folder of a run, or `None` if another process is at it."""
    lock = folder.parent / "locks" / folder.name
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(only_one(lock))
        except ValueError:
            yield None
            return
        yield folder


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> int:
    """Write the tasks if they are not there, then run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=data_folder(), help="archives and weights")
    parser.add_argument("--work", type=Path, default=WORK, help="tasks and unfinished runs")
    parser.add_argument("--results", type=Path, default=FOLDER, help="the files of results")
    parser.add_argument("--suite", choices=sorted(SUITES), action="append", help="this alone")
    parser.add_argument("--seeds", type=int, help="only the first so many")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--jobs", type=int, default=2, help="processes, a thread each")
    given = parser.parse_args()
    suites = [SUITES[name] for name in given.suite or SUITES]
    try:
        write_tasks(given.data, given.work / "tasks")
        for suite in suites:  # what is missing is told before the first run
            weights_file(suite.model.weights or "", given.data, given.work / "weights")
        if given.jobs > 1:
            return _side_by_side(given.jobs)
        torch.set_num_threads(1)
        n_seeds = max(len(suite.seeds) for suite in suites)
        for first in range(1, min(given.seeds or n_seeds, n_seeds) + 1):
            for suite in suites:  # the first seed of each before the second of any
                run_missing(suite, given.data, given.work, given.results, first, given.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _side_by_side(jobs: int) -> int:
    """The same command in `jobs` processes; they end when this one is told to."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    command = [sys.executable, "-m", "bench.evidence.run", *sys.argv[1:], "--jobs", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = [subprocess.Popen(command, env=environment) for _ in range(jobs)]
    try:
        return max(child.wait() for child in children)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()


if __name__ == "__main__":
    sys.exit(main())
