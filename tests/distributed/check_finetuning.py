"""A run that processes share is the run of one process, and goes on with any number of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from spt_kernels.distributed import Processes
from spt_kernels.errors import OtherProcessFailed
from spt_kernels.finetuning import FinetuneJob, ImageSource, Method, Recipe, finetune
from spt_kernels.finetuning.base.models import ModelSource
from spt_kernels.finetuning.training.loop import check_sharable
from spt_kernels.plan import Plan
from spt_kernels.task.file.format import read
from tests.finetuning.pictures_on_disk import write_task, write_weights
from tests.finetuning.undrawn import draw_nothing

SIZES = (2,)  # but for what says otherwise

# 21 images to train on: the last batch is of one, of which most processes have nothing
METHOD = Method("spt-lora", 700, 1, 19, dropout=0.0)
RECIPE = Recipe(epochs=1, batch_size=5, drop_path=0.0)


def everyone() -> Processes:
    return Processes.of(dist.group.WORLD)


def job_in(place: Path) -> FinetuneJob:
    def write() -> ModelSource:
        if (place / "data").exists():
            names = json.loads((place / "model.json").read_text())
            return ModelSource(**names)
        write_task(place / "data", train=8, test=3)
        source = write_weights(place / "base.safetensors")
        (place / "model.json").write_text(json.dumps(vars(source)))
        return source

    source = everyone().from_first(write)
    return FinetuneJob(source, ImageSource(str(place / "data")), METHOD, RECIPE)


def run(job: FinetuneJob, output: Path, **options: Any) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        return finetune(job, output, group=dist.group.WORLD, **options)


def run_alone(job: FinetuneJob, output: Path, **options: Any) -> None:
    """The same in the first process, for which the others wait."""

    def act() -> None:
        with pytest.MonkeyPatch.context() as patch:
            draw_nothing(patch)
            finetune(job, output, **options)

    everyone().from_first(act)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{**row, "step_ms": 0} for row in rows]


def assert_alike(ours: Path, theirs: Path) -> None:
    assert Plan.load(ours / "plan.safetensors") == Plan.load(theirs / "plan.safetensors")
    for own, other in zip(rows_of(ours), rows_of(theirs), strict=True):
        assert own == pytest.approx(other, rel=1e-5)
    tasks = [read(folder / "task.safetensors") for folder in (ours, theirs)]
    for own, other in zip(*[[*t.values.values(), *t.dense.values()] for t in tasks], strict=True):
        # a step of Adam is as long for a gradient of almost nothing as for any
        torch.testing.assert_close(own, other, rtol=1e-3, atol=3e-5)


def check_a_shared_run_is_that_of_one_process(place: Path) -> None:
    processes, job = everyone(), job_in(place)
    run_alone(job, place / "alone")
    result = run(job, place / "shared")
    assert all(other == result for other in processes.gather(result)), "all return it"
    assert result["processes"] == processes.size
    names = [{p.name for p in (place / folder).iterdir()} for folder in ("alone", "shared")]
    assert names[0] == names[1]
    assert_alike(place / "shared", place / "alone")
    predictions = [(place / f / "predictions.jsonl").read_text() for f in ("alone", "shared")]
    assert predictions[0] == predictions[1], "in the order of the images"


check_a_shared_run_is_that_of_one_process.sizes = (2, 4)


def check_a_run_goes_on_with_another_number_of_processes(place: Path) -> None:
    longer = replace(job_in(place), recipe=replace(RECIPE, epochs=2))
    run_alone(longer, place / "alone", resume=True)
    before = rows_of(place / "shared")
    run(longer, place / "shared", resume=True)
    assert rows_of(place / "shared")[: len(before)] == before
    assert_alike(place / "shared", place / "alone")
    longest = replace(longer, recipe=replace(RECIPE, epochs=3))
    for folder in ("alone", "shared"):
        run_alone(longest, place / folder, resume=True)
    assert_alike(place / "shared", place / "alone")
    assert run(longest, place / "shared", resume=True)["epochs"] == 3, "it is finished"


def check_what_was_measured_is_used_again(place: Path) -> None:
    job = job_in(place)
    result = run(replace(job, method=replace(METHOD, budget=600)), place / "shared", force=True)
    log = (place / "shared" / "log.txt").read_text()
    assert "used again" in log
    assert result["trained_parameters"] == 600


def check_a_plan_that_is_given_is_that_of_the_first(place: Path) -> None:
    job, plan = job_in(place), Plan.load(place / "shared" / "plan.safetensors")
    name, first = next((n, p) for n, p in plan.unstructured.items() if n.endswith("fc1.weight"))
    free = next(position for position in range(len(first) + 1) if position not in first)
    moved = torch.cat([torch.tensor([free]), first[1:]]).sort().values
    other = replace(plan, unstructured={**plan.unstructured, name: moved})
    path = place / f"plan-{dist.get_rank()}.safetensors"
    (plan if everyone().is_first else other).save(path)
    given = replace(job, method=None, plan=str(path))
    run_alone(given, place / "given-alone")
    run(given, place / "given")
    assert_alike(place / "given", place / "given-alone")


def check_dropout_differs_between_processes_and_not_between_runs(place: Path) -> None:
    job = replace(job_in(place), method=replace(METHOD, dropout=0.5), plan=None)
    for folder in ("first", "second"):
        run(job, place / folder)
    tasks = [(place / f / "task.safetensors").read_bytes() for f in ("first", "second")]
    assert tasks[0] == tasks[1]
    drawn = everyone().gather(torch.rand(2).tolist())
    assert len({tuple(row) for row in drawn}) == len(drawn)


def check_refusals_come_to_all(place: Path) -> None:
    job, processes = job_in(place), everyone()
    with pytest.raises(
        ValueError if processes.is_first else OtherProcessFailed, match="is not empty"
    ):
        run(job, place / "shared")
    last = processes.size - 1
    elsewhere = replace(job, images=ImageSource(str(place / "nowhere")))
    with pytest.raises(
        ValueError if processes.rank == last else OtherProcessFailed, match="nowhere"
    ):
        run(elsewhere if processes.rank == last else job, place / "new")
    processes.gather(None)  # the first has cleaned up
    assert not any(processes.gather((place / "new").exists())), "as if it had not begun"
    write_task(place / f"data-{processes.rank}", train=8 + (processes.rank == last), test=3)
    others = replace(job, images=ImageSource(str(place / f"data-{processes.rank}")))
    write_weights(place / f"{processes.rank}.safetensors", 5 + (processes.rank == last))
    weights = replace(job.model, weights=str(place / f"{processes.rank}.safetensors"))
    heavier = replace(job, model=weights, method=Method("linear"))
    longer = replace(job, recipe=replace(RECIPE, batch_size=5 + processes.rank))
    too_fast = replace(job, recipe=replace(RECIPE, lr=1e30))
    # what is wrong in all is raised in one
    for own, options, kind, message in (
        (others, {}, ValueError, f"process {last} has found other images"),
        (heavier, {}, ValueError, f"weights: process {last} has found other weights"),
        (longer, {}, ValueError, "recipe: process 1 has found other options"),
        (job, {"graph": True}, ValueError, "CUDA graphs"),
        (job, {"checkpoint_seconds": -1.0}, ValueError, "expected 0 or more, got -1.0"),
        (replace(job, method=Method("noah")), {}, ValueError, "searches in one process"),
        (too_fast, {}, FloatingPointError, "the loss is nan in epoch 1"),
    ):
        with pytest.raises(kind if processes.is_first else OtherProcessFailed, match=message):
            run(own, place / "new", **options)
        processes.gather(None)

    def listen(_: Any) -> None:
        raise OSError("the tracker is away")

    with pytest.raises(OSError if processes.is_first else OtherProcessFailed, match="is away"):
        run(job, place / "listened", on_epoch=listen if processes.is_first else None)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="trains 1 by statistics of whole batches"):
        check_sharable(net, "full")
    net.spt_tuning = object()
    check_sharable(net, "spt-lora")
