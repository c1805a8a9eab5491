"""One fine-tuning run from images to a task file, which can be killed and resumed at any moment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..approximation import approximate, parse_approximation
from ..distributed import Processes
from ..files.picture import check_can_draw, save_picture
from ..methods import Method, tune
from ..methods.tunable import Tunable
from ..offloading import OffloadWords, offload, why_not_offloaded
from ..plan import Plan
from ..plan.figure import sensitivity_figure
from ..recomputation import blocks_by, recompute_by
from ..recomputation.conditions import NotRecomputable
from .base.head import check_head, with_head
from .device import reproducible, seed_everything
from .folder.checkpoint import Best
from .folder.events import EventFiles, check_can_write_events
from .folder.run_folder import RunFolder
from .folder.shared_folder import opened
from .images.pixels import Batches
from .job.given_plan import settled
from .job.job import FinetuneJob
from .job.recipe import Recipe
from .preparation.fitted import check_memory, check_offload, fitted_recipe
from .preparation.stages import Decision, preparation_of
from .progress import Logged, Progress, Silent
from .results.curves import training_curves_figure
from .run.alike import check_alike
from .run.description import description_of
from .run.facts import accounted_bytes, config_of, facts_of, machine_of, measured_bytes, trains
from .run.run import Clock, Run, check_weights_stay, finished_in, spent_in
from .run.same_inputs import check_as_begun
from .run.setting import Setting, open_setting
from .training.accuracy import evaluate
from .training.best import BestSoFar, save_best
from .training.loop import EpochFigures, check_goes_on, check_sharable, median_step_ms, train
from .training.run_step import wants_graph


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
    deterministic: bool = False,
    progress: Progress | None = None,
    on_epoch: Callable[[EpochFigures], object] | None = None,
    tensorboard: bool = False,
    group: Any = None,
) -> dict[str, Any]:
    """Run `job` and write all it makes into the folder `output`; return what `result.json` holds.

    A run that was killed, wherever that was, and is resumed gives the same task file, to the byte,
    as one that was not, on the same machine with the same number of threads and the same `graph`;
    on a card with attention, where `deterministic`.

    The task file is of the last epoch, and the test images are looked at once, with that. Where an
    earlier epoch was better on the validation images, what it trained is in a file beside,
    `best-task.safetensors`; the result names it.

    With a `group` its processes share the run: each calls this alike, has a share of every batch,
    of the samples of the sensitivity and of the images that are looked at. The first one writes
    and speaks, all return the result. The batch is that of the recipe, however many share it, so
    that the result is that of one process, up to what sums in another order round and to which
    elements a dropout drops. A run goes on with any number of processes.

    The random generators of Python, numpy and torch are seeded by the run, and stay so.

    Args:
        job: what to do.
        output: a folder, which must be empty or absent unless `resume` or `force`.
        resume: go on with the run in `output`. What makes a step fit (`HOW_IT_FITS`: micro_batch,
            recompute, memory_bytes, offload) may be other than it was. A run that is finished is
            returned as it is, unless the job has more epochs than it and its patience has not ended
            it: then it goes on to these, and the learning rate from there on is that of the longer
            schedule, so it rises again.
        force: overwrite the run in `output`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        workers: processes that decode images; 0 decodes in this one.
        checkpoint_seconds: least time between two checkpoints.
        graph: whether training steps run as CUDA graphs; `None` lets them on a card where they can.
        deterministic: refuse operations that have no deterministic implementation, of which torch
            only warns otherwise. Attention on a card has a slower one, which is taken only then.
        progress: told how far it is; what it is told is in `log.txt` as well.
        on_epoch: called with the figures of each epoch that this call trains, when it is over, for
            any tracker of experiments; of a group in the first process alone. What it raises ends
            the run, which can be resumed.
        tensorboard: write events for TensorBoard below the folder, in `tensorboard`.
        group: of `torch.distributed`, as `torch.distributed.group.WORLD`, whose processes share the
            run; None for this process alone.

    Raises:
        ValueError: anything about the job that cannot be done; the folder is then as it was, save
            for a sensitivity that was measured, which the next try uses.
        OtherProcessFailed: another process of the group found that, and raises it.
    """
    processes = Processes.of(group)
    # what is wrong in all of them is raised in one
    processes.together(lambda: _check_call(checkpoint_seconds, graph, tensorboard, processes))
    graph = False if processes.size > 1 else graph
    log = Logged(progress if progress is not None and processes.is_first else Silent())
    clock = Clock()
    with (
        opened(processes, output, resume=resume, force=force) as folder,
        reproducible(strictly=deterministic),
        contextlib.ExitStack() as closing,
    ):
        with folder.starting():
            start = processes.together(
                lambda: _started(job, folder, resume, device, workers, graph, log, processes)
            )
            if isinstance(start, dict):
                log.say("this run is finished")
                return start
            setting, images, prepare = start
            processes.together(lambda: check_alike(setting))
            config = config_of(setting)
            if resume:
                processes.together(lambda: check_as_begun(folder.read_config() or {}, config))
                clock.spent = spent_in(folder)
            for note in setting.training_notes():
                log.say(note)
            run = Run(
                setting,
                config,
                folder,
                clock,
                log,
                checkpoint_seconds,
                processes=processes,
            )
            decision = prepare(run, images)
            ready = processes.together(lambda: _made_ready(setting, decision, folder, resume))
            run.claim()
            if ready.plan is not None:
                ready.plan.save(folder["plan"])
            for line in trains(setting, ready.tunable.trained, ready.facts, ready.plan):
                log.say(line)
            label = getattr(ready.tunable.model, "spt_approximation", None)
            if label is not None:
                log.say(label.summary())
            if ready.line:
                log.say(ready.line)
            events = None
            if tensorboard and processes.is_first:
                events = closing.enter_context(EventFiles(folder.events, run.config))
            history, best = _train(run, images, ready, graph, on_epoch, events)
        result = _finish(run, ready, history, best)
        if events is not None:
            events.finish(history[-1].epoch, {"accuracy/test": result["test_accuracy"]})
        return result


def _check_call(
    checkpoint_seconds: float, graph: bool | None, tensorboard: bool, processes: Processes
) -> None:
    """Refuse what no job can be run with."""
    if not checkpoint_seconds >= 0:
        raise ValueError(f"checkpoint_seconds: expected 0 or more, got {checkpoint_seconds}")
    check_can_draw()  # what would be missed at the end
    if tensorboard:
        check_can_write_events()
    if graph and processes.size > 1:
        raise ValueError("graph: steps that processes share run without CUDA graphs")


# the model and the images, batches to train on, and what decides with these what is trained
_Start = tuple[Setting, Batches, Callable[[Run[Setting], Batches], Decision]]


def _started(
    job: FinetuneJob,
    folder: RunFolder,
    resume: bool,
    device: str,
    workers: int,
    graph: bool | None,
    log: Logged,
    processes: Processes,
) -> _Start | dict[str, Any]:
    """What there is before anything is computed; or the result of a run that is finished."""
    check_weights_stay(folder, job.model.weights)
    job, plan, given = settled(job, folder, resume=resume)
    finished = finished_in(folder, job, "epochs") if resume else None
    if finished is not None:
        return finished
    setting = open_setting(job, device, workers, processes)
    wants_graph(graph, setting.device)  # or refuses
    check_memory(setting)
    check_offload(setting, graph)
    if job.recipe.recompute is not None:
        blocks_by(setting.base.model, job.recipe.recompute)  # or refuses
    method = with_head(job.method, setting.base.model, setting.form)
    decided = given if plan is None else plan
    check_head(setting.base.model, method, decided, len(setting.splits.train.classes))
    prepare = preparation_of(setting, method, plan, given)
    if job.recipe.patience is not None and setting.splits.val is None:
        raise ValueError("patience: there are no validation images to know a better epoch by")
    images = setting.training_batches(log)  # a bad one is found here
    setting.check_readable(log)  # or there, and not after the training
    return setting, images, prepare


@dataclass(frozen=True)
class _Ready:
    """A model ready to train, and what was told of it before."""

    tunable: Tunable
    method: Method
    plan: Plan | None
    recipe: Recipe  # with what the memory left open
    line: str
    facts: dict[str, Any]
    accounted_bytes: int


def _made_ready(setting: Setting, decision: Decision, folder: RunFolder, resume: bool) -> _Ready:
    method, plan = decision.method, decision.plan
    facts = facts_of(setting, plan, method.head_with(plan))
    # what a method draws for its modules is the same whatever was drawn before
    seed_everything(setting.job.recipe.seed)
    away = OffloadWords.parse(setting.job.recipe.offload).weights
    # what would not fit the device is tuned on the host, and stays there
    home = setting.device if away == "nothing" else torch.device("cpu")
    tunable = tune(setting.base.model.to(home), method, plan)
    if away != "nothing" and (lacking := why_not_offloaded(tunable.model, away)):
        raise ValueError(f"offload: {lacking}")
    choice = parse_approximation(setting.job.recipe.approximate)
    if choice:
        approximate(tunable.model, **choice)
    recipe, line = fitted_recipe(setting, tunable.model)
    if recipe.recompute is not None:
        recompute_by(tunable.model, recipe.recompute)
    if setting.processes.size > 1:
        check_sharable(tunable.model, method.name)
    try:
        accounted = accounted_bytes(setting, recipe, tunable)
    except NotRecomputable as reason:  # what a rehearsal alone can tell
        raise ValueError(f"recompute: {reason}") from reason
    if away != "nothing":
        held = offload(tunable.model, away, device=setting.device)
        blocks, told = len(held.streamed), f"{held.host_bytes / 2**20:,.0f} MiB"
        line += f"{'; ' if line else ''}frozen weights of {blocks} blocks on the host, {told}"
    if resume:
        check_goes_on(tunable.model, recipe, folder.left)
    return _Ready(tunable, method, plan, recipe, line, facts, accounted)


def _finish(
    run: Run[Setting], ready: _Ready, history: list[EpochFigures], best: Best | None
) -> dict[str, Any]:
    """Save what was trained, test it, draw it, and write down the result."""
    setting, folder = run.setting, run.folder
    if not run.processes.is_first:  # it looks at its share of the test images
        _test(setting, ready.tunable.model, folder, run.log)
        return run.processes.from_first(dict)
    tunable, last, plan = ready.tunable, history[-1], ready.plan
    # what was asked for, with what was found out: its head is found again
    method = replace(setting.job.method, architecture=ready.method.architecture)
    described = description_of(setting, tunable.file, method).to_json()
    size = tunable.save(folder[tunable.file], described)
    best_file = save_best(tunable, folder, best, last.epoch, described)
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
        "stopped_early": last.epoch < job.recipe.epochs,
        "best_epoch": None if best is None else best.epoch,
        "best_val_accuracy": None if best is None else history[best.epoch - 1].val_accuracy,
        "best_file": best_file,
        "trained_parameters": tunable.trained,
        **ready.facts,
        "micro_batch": ready.recipe.micro_batch,
        "recompute": ready.recipe.recompute,
        "offload": ready.recipe.offload,
        "accounted_peak_bytes": ready.accounted_bytes,
        "file": folder[tunable.file].name,
        "task_bytes": size,
        "step_ms": median_step_ms(history),
        "measured_peak_bytes": measured_bytes(setting.device),
        "seconds": round(run.clock(), 1),
        "processes": setting.processes.size,
        **machine_of(setting.device),
    }
    run.finish(result)
    return run.processes.from_first(lambda: result)


def _train(
    run: Run[Setting],
    images: Batches,
    ready: _Ready,
    graph: bool | None,
    on_epoch: Callable[[EpochFigures], object] | None,
    events: EventFiles | None,
) -> tuple[list[EpochFigures], Best | None]:
    """The figures of all epochs, and what was trained in the best."""
    job, folder = run.setting.job, run.folder
    val = run.setting.batches("val", run.log)
    best = BestSoFar()

    def tell_listener(figures: EpochFigures) -> None:
        if on_epoch is not None and run.processes.is_first:
            on_epoch(figures)

    def keep(rows: list[EpochFigures]) -> None:
        folder.write_lines("metrics", [asdict(row) for row in rows])
        run.note_seconds()
        if events is not None:
            events.write(rows)

    # afresh, so that training is the same whether sensitivities were measured or found on disk
    seed_everything(job.recipe.seed)
    history = train(
        ready.tunable.model,
        images,
        ready.recipe,
        lr=job.recipe.peak_lr(job.method),
        val=val,
        checkpoint=folder["checkpoint"],
        checkpoint_seconds=run.checkpoint_seconds,
        on_epoch=keep,
        # whoever waits for the others is told where it fails
        on_new_epoch=lambda figures: run.processes.together(lambda: tell_listener(figures)),
        graph=graph,
        progress=run.log,
        tell=run.log.say,
        best=best,
    )
    return history, best.best


def _test(setting: Setting, model: nn.Module, folder: RunFolder, log: Logged) -> float | None:
    """Accuracy on the test images, whose predictions are written down; `None` without any."""
    test, images = setting.batches("test", log), setting.splits.test
    if test is None or images is None:
        return None
    processes = setting.processes
    log.start("testing", processes.share(len(images)))
    amp = setting.job.recipe.amp
    seen = evaluate(model, test, amp=amp, on_batch=log.advance, processes=processes)
    rows = [
        {"image": str(path), "label": images.classes[label], "predicted": images.classes[chosen]}
        for path, label, chosen in zip(images.paths, images.labels, seen.predictions, strict=True)
    ]
    folder.write_lines("predictions", rows)
    return seen.top1
