"""One fine-tuning run from images to a task file, which can be killed and resumed at any moment."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..memory import estimate_memory
from ..methods import Method, make_plan, tune
from ..methods.tunable import Tunable
from ..model import backbone_numel, head_numel
from ..plan import Plan
from ..plan.figure import sensitivity_figure
from ..sensitivity import Sensitivity, skewed_sensitivity
from .accuracy import evaluate
from .curves import training_curves_figure
from .description import description_of
from .device import reproducible, seed_everything
from .job import FinetuneJob, plain
from .progress import Progress, Silent
from .run_folder import RunFolder
from .run_step import wants_graph
from .setting import Setting, open_setting, sensitivity_of
from .training import EpochFigures, median_step_ms, train


def finetune(
    job: FinetuneJob,
    output: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    workers: int = 0,
    checkpoint_seconds: float = 60.0,
    graph: bool | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run `job` and write all it makes into the folder `output`; return what `result.json` holds.

    A run that was killed and is resumed gives the same task file, to the byte, as one that was not,
    on the same machine with the same number of threads and the same `graph`.

    Args:
        job: what to do.
        output: a folder, which must be empty or absent unless `resume` or `force`.
        resume: go on with the run in `output`; one that is finished is returned as it is.
        force: overwrite the run in `output`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        workers: processes that decode images; 0 decodes in this one.
        checkpoint_seconds: least time between two checkpoints.
        graph: whether training steps run as CUDA graphs; `None` lets them on a card where they can.
        progress: told how far it is.

    Raises:
        ValueError: anything about the job that cannot be done; the folder is then as it was.
    """
    progress = progress or Silent()
    started = time.monotonic()
    folder = RunFolder.open(output, resume=resume, force=force)
    if resume:
        finished = _finished(folder, job)
        if finished is not None:
            progress.say("this run is finished")
            return finished
    with reproducible():
        setting = open_setting(job, device, workers)
        wants_graph(graph, setting.device)  # or refuses
        if not setting.base.head_is_new:
            progress.say("the head is that of the weights, as the classes are as many (new_head)")
        kept = resume and folder["plan"].is_file()
        measured, plan = _plan(setting, folder["plan"] if kept else job.plan, progress)
        facts = _facts(setting, plan)
        tunable = tune(setting.base.model.to(setting.device), job.method, plan)
        accounted = _accounted_bytes(setting, tunable)
        if force:
            folder.clear()  # not before the job is known to be possible
        folder.write_json("config", _config(setting))
        if measured is not None:
            measured.save(folder["sensitivity"])
        if plan is not None:
            plan.save(folder["plan"])
        history = _train(setting, tunable.model, folder, checkpoint_seconds, graph, progress)
        size = tunable.save(folder[tunable.file], description_of(setting, tunable.file).to_json())
        accuracy = _test(setting, tunable.model, folder, progress)
    last = history[-1]
    result = {
        "method": job.method.name,
        "test_accuracy": accuracy,
        "val_accuracy": last.val_accuracy,
        "train_loss": last.train_loss,
        "epochs": last.epoch,
        "trained_parameters": tunable.trained,
        **facts,
        "accounted_peak_bytes": accounted,
        "file": folder[tunable.file].name,
        "task_bytes": size,
        "step_ms": median_step_ms(history),
        "measured_peak_bytes": _measured_bytes(setting),
        "seconds": round(time.monotonic() - started, 1),
        **_machine(setting),
    }
    if plan is not None and plan.selected:
        sensitivity_figure(plan).savefig(folder["sensitivity_picture"])
    training_curves_figure({job.method.name: history}).savefig(folder["curves_picture"])
    folder.write_json("result", result)
    folder["checkpoint"].unlink(missing_ok=True)
    return result


def _finished(folder: RunFolder, job: FinetuneJob) -> dict[str, Any] | None:
    """The result of a run that is over; `ValueError` if the folder holds another job's."""
    config = folder.read_json("config")
    difference = None if config is None else job.difference_from(config.get("job", {}))
    if difference is not None:
        raise ValueError(f"output: {folder.path} holds another job ({difference})")
    return folder.read_json("result")


def _plan(
    setting: Setting, file: str | Path | None, progress: Progress
) -> tuple[Sensitivity | None, Plan | None]:
    """The sensitivities, where they had to be measured, and the plan, which may be in a file."""
    job, model = setting.job, setting.base.model
    if file is not None:
        plan = Plan.load(file)
        if not job.method.entry.may_make(plan):
            kind = plan.kind or "unstructured"
            raise ValueError(f"plan: expected one of method {job.method.name!r}, got {kind}")
        return None, plan
    if job.sensitivity is not None:
        return None, make_plan(model, job.method, Sensitivity.load(job.sensitivity))
    if not job.method.is_sensitivity_aware:
        return None, make_plan(model, job.method)
    _check_possible(job.method, model)
    measured = sensitivity_of(setting, progress)
    return measured, make_plan(model, job.method, measured)


def _check_possible(method: Method, model: nn.Module) -> None:
    """Refuse, by made-up scores, before the long measuring what no scores would make possible."""
    # whether any module is worth its place depends on the scores
    method = replace(method, name=method.name.removesuffix("-structured"))
    tune(copy.deepcopy(model), method, make_plan(model, method, skewed_sensitivity(model)))


def _train(
    setting: Setting,
    model: nn.Module,
    folder: RunFolder,
    checkpoint_seconds: float,
    graph: bool | None,
    progress: Progress,
) -> list[EpochFigures]:
    job = setting.job
    batches = setting.batches("train", progress, train=True)
    assert batches is not None
    # afresh, so that training is the same whether sensitivities were measured or found on disk
    seed_everything(job.recipe.seed)
    return train(
        model,
        batches,
        job.recipe,
        lr=job.recipe.peak_lr(job.method),
        val=setting.batches("val", progress),
        checkpoint=folder["checkpoint"],
        checkpoint_seconds=checkpoint_seconds,
        on_epoch=lambda rows: folder.write_lines("metrics", [asdict(row) for row in rows]),
        graph=graph,
        progress=progress,
    )


def _test(
    setting: Setting, model: nn.Module, folder: RunFolder, progress: Progress
) -> float | None:
    """Accuracy on the test images, whose predictions are written down; `None` without any."""
    test, images = setting.batches("test", progress), setting.splits.test
    if test is None or images is None:
        return None
    progress.start("testing", len(images))
    seen = evaluate(model, test, amp=setting.job.recipe.amp, on_batch=progress.advance)
    rows = [
        {"image": str(path), "label": images.classes[label], "predicted": images.classes[chosen]}
        for path, label, chosen in zip(images.paths, images.labels, seen.predictions, strict=True)
    ]
    folder.write_lines("predictions", rows)
    return seen.top1


def _facts(setting: Setting, plan: Plan | None) -> dict[str, Any]:
    """What is trained, on what; told from the plain model."""
    model = setting.base.model
    return {
        "unstructured_parameters": None if plan is None else plan.num_unstructured,
        "structured_parameters": None if plan is None else plan.num_structured,
        "head_parameters": head_numel(model),
        "backbone_parameters": backbone_numel(model),
        "budget": None if plan is None else plan.budget,
        "lr": setting.job.recipe.peak_lr(setting.job.method),
        "drop_path": setting.base.drop_path,
        "images": {name: len(s) for name, s in vars(setting.splits).items() if s is not None},
    }


def _accounted_bytes(setting: Setting, tunable: Tunable) -> int:
    """The peak of a training step."""
    recipe, form = setting.job.recipe, setting.form
    return estimate_memory(
        tunable.model,
        (recipe.batch_size, len(form.mean), form.size, form.size),
        dtype="bf16-autocast" if recipe.amp == "bf16" else "fp32",
        device="cuda" if setting.device.type == "cuda" else "cpu",
    ).peak_bytes


def _measured_bytes(setting: Setting) -> int | None:
    if setting.device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(setting.device)


def _machine(setting: Setting) -> dict[str, Any]:
    on_gpu = setting.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(setting.device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"spt_kernels": __version__, "torch": torch.__version__},
    }


def _config(setting: Setting) -> dict[str, Any]:
    return {
        "job": setting.job.to_json(),
        "classes": list(setting.splits.train.classes),
        "preprocessing": plain(asdict(setting.form)),
        "head_is_new": setting.base.head_is_new,
        "version": __version__,
    }
