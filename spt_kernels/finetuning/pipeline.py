"""One fine-tuning run from images to a task file, which can be killed and resumed at any moment."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..files.picture import check_can_draw, save_picture
from ..methods import Method, tune
from ..methods.tunable import Tunable
from ..plan import Plan
from ..plan.figure import sensitivity_figure
from .accuracy import evaluate
from .checkpoint import Best, put_state
from .curves import training_curves_figure
from .description import description_of
from .device import reproducible, seed_everything
from .facts import accounted_bytes, config_of, facts_of, machine_of, measured_bytes, trains
from .given_plan import settled
from .head import with_head
from .job import FinetuneJob
from .pixels import Batches
from .preparation import Decision, preparation_of
from .progress import Logged, Progress, Silent
from .run import Clock, Run, finished_in, spent_in
from .run_folder import RunFolder
from .run_step import wants_graph
from .setting import Setting, open_setting
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

    A run that was killed, wherever that was, and is resumed gives the same task file, to the byte,
    as one that was not, on the same machine with the same number of threads and the same `graph`.

    The task file is of the last epoch, and the test images are looked at once, with that. Where an
    earlier epoch was better on the validation images, what it trained is in a file beside,
    `best-task.safetensors`; the result names it.

    Args:
        job: what to do.
        output: a folder, which must be empty or absent unless `resume` or `force`.
        resume: go on with the run in `output`. One that is finished is returned as it is, unless
            the job has more epochs than it: then it goes on to these, and the learning rate from
            there on is that of the longer schedule, so it rises again.
        force: overwrite the run in `output`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        workers: processes that decode images; 0 decodes in this one.
        checkpoint_seconds: least time between two checkpoints.
        graph: whether training steps run as CUDA graphs; `None` lets them on a card where they can.
        progress: told how far it is; what it is told is in `log.txt` as well.

    Raises:
        ValueError: anything about the job that cannot be done; the folder is then as it was, save
            for a sensitivity that was measured, which the next try uses.
    """
    if not checkpoint_seconds >= 0:
        raise ValueError(f"checkpoint_seconds: expected 0 or more, got {checkpoint_seconds}")
    check_can_draw()  # what would be missed at the end
    log = Logged(progress or Silent())
    clock = Clock()
    folder = RunFolder.open(output, resume=resume, force=force)
    with reproducible():
        with folder.starting():
            job, plan, given = settled(job, folder, resume=resume)
            if resume:
                finished = finished_in(folder, job, "epochs")
                if finished is not None:
                    log.say("this run is finished")
                    return finished
                clock.spent = spent_in(folder)
            setting = open_setting(job, device, workers)
            wants_graph(graph, setting.device)  # or refuses
            model = setting.base.model
            method = with_head(job.method, model, setting.form)
            prepare = preparation_of(setting, method, plan, given)
            images = setting.training_batches(log)  # a bad one is found here
            for note in setting.notes():
                log.say(note)
            run = Run(setting, config_of(setting), folder, clock, log, checkpoint_seconds)
            ready = _made_ready(setting, prepare(run, images))
            run.claim()
            if ready.plan is not None:
                ready.plan.save(folder["plan"])
            for line in trains(setting, ready.tunable.trained, ready.facts, ready.plan):
                log.say(line)
            history, best = _train(run, images, ready.tunable, graph)
        return _finish(run, ready, history, best)


@dataclass(frozen=True)
class _Ready:
    """A model ready to train, and what was told of it before."""

    tunable: Tunable
    method: Method
    plan: Plan | None
    facts: dict[str, Any]
    accounted_bytes: int


def _made_ready(setting: Setting, decision: Decision) -> _Ready:
    method, plan = decision.method, decision.plan
    facts = facts_of(setting, plan, method.head_with(plan))
    # what a method draws for its modules is the same whatever was drawn before
    seed_everything(setting.job.recipe.seed)
    tunable = tune(setting.base.model.to(setting.device), method, plan)
    return _Ready(tunable, method, plan, facts, accounted_bytes(setting, tunable))


def _finish(
    run: Run[Setting], ready: _Ready, history: list[EpochFigures], best: Best | None
) -> dict[str, Any]:
    """Save what was trained, test it, draw it, and write down the result."""
    setting, folder = run.setting, run.folder
    tunable, last, plan = ready.tunable, history[-1], ready.plan
    # what was asked for, with what was found out: its head is found again
    method = replace(setting.job.method, architecture=ready.method.architecture)
    described = description_of(setting, tunable.file, method).to_json()
    size = tunable.save(folder[tunable.file], described)
    best_file = _save_best(tunable, folder, best, last.epoch, described)
    accuracy = _test(setting, tunable.model, folder, run.log)
    if plan is not None and plan.selected:
        save_picture(sensitivity_figure(plan), folder["sensitivity_picture"])
    job = setting.job
    curves = training_curves_figure(history, title=f"{job.model.name}, {job.method.name}")
    save_picture(curves, folder["curves_picture"])
    result = {
        "method": setting.job.method.name,
        "test_accuracy": accuracy,
        "val_accuracy": last.val_accuracy,
        "train_loss": last.train_loss,
        "epochs": last.epoch,
        "best_epoch": None if best is None else best.epoch,
        "best_val_accuracy": None if best is None else history[best.epoch - 1].val_accuracy,
        "best_file": best_file,
        "trained_parameters": tunable.trained,
        **ready.facts,
        "accounted_peak_bytes": ready.accounted_bytes,
        "file": folder[tunable.file].name,
        "task_bytes": size,
        "step_ms": median_step_ms(history),
        "measured_peak_bytes": measured_bytes(setting.device),
        "seconds": round(run.clock(), 1),
        **machine_of(setting.device),
    }
    run.finish(result)
    return result


def _train(
    run: Run[Setting], images: Batches, tunable: Tunable, graph: bool | None
) -> tuple[list[EpochFigures], Best | None]:
    """The figures of all epochs, and what was trained in the best."""
    job, folder = run.setting.job, run.folder
    val = run.setting.batches("val", run.log)
    bests: list[Best | None] = [None]

    def on_epoch(rows: list[EpochFigures]) -> None:
        folder.write_lines("metrics", [asdict(row) for row in rows])
        run.note_seconds()

    # afresh, so that training is the same whether sensitivities were measured or found on disk
    seed_everything(job.recipe.seed)
    history = train(
        tunable.model,
        images,
        job.recipe,
        lr=job.recipe.peak_lr(job.method),
        val=val,
        checkpoint=folder["checkpoint"],
        checkpoint_seconds=run.checkpoint_seconds,
        on_epoch=on_epoch,
        graph=graph,
        progress=run.log,
        tell=run.log.say,
        on_best=lambda best: bests.__setitem__(0, best),
    )
    return history, bests[0]


def _save_best(
    tunable: Tunable,
    folder: RunFolder,
    best: Best | None,
    last_epoch: int,
    described: dict[str, Any],
) -> str | None:
    """Write what the best epoch trained beside the last one's; its name, `None` if they are one."""
    path = folder[f"best_{tunable.file}"]
    if best is None or best.epoch == last_epoch:
        path.unlink(missing_ok=True)  # of a run that was shorter
        return None
    last = Best.take(last_epoch, tunable.model)
    put_state(tunable.model, best.tensors)
    tunable.save(path, described)
    put_state(tunable.model, last.tensors)
    return path.name


def _test(setting: Setting, model: nn.Module, folder: RunFolder, log: Logged) -> float | None:
    """Accuracy on the test images, whose predictions are written down; `None` without any."""
    test, images = setting.batches("test", log), setting.splits.test
    if test is None or images is None:
        return None
    log.start("testing", len(images))
    seen = evaluate(model, test, amp=setting.job.recipe.amp, on_batch=log.advance)
    rows = [
        {"image": str(path), "label": images.classes[label], "predicted": images.classes[chosen]}
        for path, label, chosen in zip(images.paths, images.labels, seen.predictions, strict=True)
    ]
    folder.write_lines("predictions", rows)
    return seen.top1
