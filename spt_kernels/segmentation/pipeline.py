"""One segmentation run from scenes to a task file, which can be killed and resumed at will."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..files.picture import check_can_draw, save_picture
from ..finetuning.device import reproducible, seed_everything
from ..finetuning.folder.checkpoint import Best, Checkpoint
from ..finetuning.folder.events import EventFiles, check_can_write_events
from ..finetuning.folder.run_folder import RunFolder
from ..finetuning.job.given_plan import settled
from ..finetuning.preparation.measured import measure_on, measured_once
from ..finetuning.preparation.possible import check_possible
from ..finetuning.progress import Logged, Progress, Silent
from ..finetuning.results.curves import training_curves_figure
from ..finetuning.run.facts import machine_of, measured_bytes
from ..finetuning.run.run import Clock, Run, check_weights_stay, finished_in, spent_in
from ..finetuning.run.same_inputs import check_as_begun
from ..finetuning.training.best import BestSoFar, save_best
from ..finetuning.training.loop import median_step_ms
from ..finetuning.training.run_step import wants_graph
from ..methods import Method, make_plan, tune
from ..methods.tunable import Tunable
from ..model import head_names
from ..model.head import layers_of
from ..plan import Plan
from ..plan.figure import sensitivity_figure
from ..recomputation import blocks_by, recompute_by
from ..sensitivity import Sensitivity
from ..sensitivity.per_sample.batches import NoSamples
from .ade20k import IGNORED
from .evaluation import evaluate_scenes
from .facts import accounted_bytes, facts_of, notes_of, trains
from .job import SegmentationJob
from .pictures import check_folder, check_names
from .setting import SegmentationSetting, no_label_held_out, open_segmentation
from .training import NO_LABEL, REPORT_EVERY, IterationFigures, train_segmentation


def segment(
    job: SegmentationJob,
    output: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    workers: int = 0,
    checkpoint_seconds: float = 60.0,
    graph: bool | None = None,
    multi_scale: bool = False,
    save_predictions: Path | None = None,
    progress: Progress | None = None,
    on_report: Callable[[IterationFigures], object] | None = None,
    tensorboard: bool = False,
    report_every: int = REPORT_EVERY,
) -> dict[str, Any]:
    """Tune a ViT to label every pixel, as in the paper's Table 5; return what `result.json` holds.

    Sensitivities are measured by the loss of the decoder as it starts, per image the mean over its
    labelled pixels; what they choose of the backbone is trained, and the decoder whole.

    A run that was killed, wherever that was, and is resumed gives the same task file, to the byte,
    as one that was not, on the same CPU with the same number of threads.

    ADE20K's validation images are its test: they are looked at once, at the end. A share of the
    training images that is held out (`job.val_share`) tells which iteration was best, and may end
    training early. The task file is of the last iteration; where an earlier one was better, what it
    trained is in a file beside, `best-task.safetensors`; the result names it.

    Args:
        job: what to do.
        output: a folder, which must be empty or absent unless `resume` or `force`.
        resume: go on with the run in `output`. One that is finished is returned as it is, unless
            the job has more iterations than it and its patience has not ended it: then it goes on
            to these. It is not tested once more: that is `spt-kernels evaluate`. What is computed
            again (the recipe's `recompute`) may be other than it was.
        force: overwrite the run in `output`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        workers: processes that read scenes; 0 reads in this one.
        checkpoint_seconds: least time between two checkpoints.
        graph: whether training steps run as CUDA graphs; `None` lets them on a card where they can.
        multi_scale: test at several scales and mirrored as well.
        save_predictions: a folder for the predicted label maps of the validation images, which must
            be empty or absent as well; a file of the scenes is never overwritten.
        progress: told how far it is; what it is told is in `log.txt` as well.
        on_report: called with the figures of each report that this call trains, when it is over,
            for any tracker of experiments. What it raises ends the run, which can be resumed.
        tensorboard: write events for TensorBoard below the folder, in `tensorboard`.
        report_every: iterations from one line of `metrics.jsonl`, and possible checkpoint, to the
            next.

    Raises:
        ValueError: anything about the job that cannot be done; the folder is then as it was, save
            for a sensitivity that was measured, which the next try uses.
    """
    if not checkpoint_seconds >= 0:
        raise ValueError(f"checkpoint_seconds: expected 0 or more, got {checkpoint_seconds}")
    if report_every < 1:
        raise ValueError(f"report_every: expected 1 or more, got {report_every}")
    check_folder(save_predictions, force=force or resume)
    check_can_draw()  # what would be missed at the end
    if tensorboard:
        check_can_write_events()
    log = Logged(progress or Silent())
    clock = Clock()
    folder = RunFolder.open(output, resume=resume, force=force)
    with reproducible(), contextlib.ExitStack() as closing:
        with folder.starting():
            check_weights_stay(folder, job.model.weights)
            job, plan, given = settled(job, folder, resume=resume)
            if resume:
                finished = finished_in(folder, job, "iterations")
                if finished is not None:
                    _check_tested(folder, finished, multi_scale, save_predictions)
                    log.say("this run is finished; `evaluate` tests it once more")
                    return finished
                clock.spent = spent_in(folder)
            setting = open_segmentation(job, device, workers)
            config = setting.config()
            if resume:
                check_as_begun(folder.read_config() or {}, config)
            if save_predictions is not None:
                check_names(
                    setting.validation.paths,
                    save_predictions,
                    besides=setting.files(),
                    argument="save_predictions",
                )
            wants_graph(graph, setting.device)  # or refuses
            if job.recipe.recompute is not None:
                blocks_by(setting.base.model, job.recipe.recompute)  # likewise
            run = Run(setting, config, folder, clock, log, checkpoint_seconds)
            ready = _made_ready(run, plan, given)
            events = None
            if tensorboard:
                events = closing.enter_context(EventFiles(folder.events, run.config))
            history, best = _train(run, ready.tunable, graph, report_every, on_report, events)
        result = _finish(run, ready, history, best, multi_scale, save_predictions)
        if events is not None:
            events.finish(history[-1].iteration, {"mIoU/test": result["miou"]})
        return result


def _check_tested(
    folder: RunFolder, result: dict[str, Any], multi_scale: bool, save_predictions: Path | None
) -> None:
    """Refuse a test that a finished run has not had; one that is asked for again is fine."""
    lacking = {}
    if multi_scale and result.get("miou_multi_scale") is None:
        lacking["multi_scale"] = "--multi-scale"
    if save_predictions is not None and not any(save_predictions.glob("*-overlay.png")):
        lacking["save_predictions"] = f"--save-predictions {save_predictions}"
    if lacking:
        how = f"spt-kernels evaluate {folder.path} {' '.join(lacking.values())}"
        raise ValueError(f"{', '.join(lacking)}: the run is finished; `{how}` tests it so")


@dataclass(frozen=True)
class _Ready:
    """A model ready to train, and what was told of it before."""

    method: Method
    plan: Plan | None
    tunable: Tunable
    facts: dict[str, Any]
    accounted_bytes: int


def _made_ready(
    run: Run[SegmentationSetting], plan: Plan | None, given: Sensitivity | None
) -> _Ready:
    """Plan, tune, and make the folder this run's; a plan that is given is kept."""
    setting, model = run.setting, run.setting.base.model
    method = replace(setting.job.method, head=model.trained_whole)
    for note in notes_of(setting):
        run.log.say(note)
    is_measured = plan is None and given is None and method.is_sensitivity_aware
    if is_measured:
        check_possible(method, model)
        if setting.job.recipe.recompute is not None:  # told before hours are measured
            accounted_bytes(setting, model, setting.job.recipe.recompute)
    setting.check_readable(run.log)  # some of it is read after the training alone
    if is_measured:
        given = _measured(run, method)
    for name, file in (("plan", plan), ("sensitivity", given)):
        if file is not None and file.head != head_names(model, method.head):
            raise ValueError(
                f"{name}: expected one whose head is the decoder, "
                f"{', '.join(model.trained_whole)}, got {', '.join(layers_of(file.head)) or 'none'}"
            )
    plan = make_plan(model, method, given) if plan is None else plan
    facts = facts_of(setting, plan, model.trained_whole)
    # what a method draws for its modules is the same whatever was drawn before
    seed_everything(setting.job.recipe.seed)
    tunable = tune(model.to(setting.device), method, plan)
    if setting.job.recipe.recompute is not None:
        recompute_by(tunable.model, setting.job.recipe.recompute)
    accounted = accounted_bytes(setting, tunable.model)
    if not run.folder.replaces:
        Checkpoint.begun(run.folder.left, tunable.model)  # or refuses
    run.claim()
    if plan is not None:
        plan.save(run.folder["plan"])
    run.log.say(trains(method, tunable, plan, facts))
    return _Ready(method, plan, tunable, facts, accounted)


def _finish(
    run: Run[SegmentationSetting],
    ready: _Ready,
    history: list[IterationFigures],
    best: Best | None,
    multi_scale: bool,
    save_predictions: Path | None,
) -> dict[str, Any]:
    """Save what was trained, test it, draw it, and write down the result."""
    setting, folder = run.setting, run.folder
    job, tunable, last = setting.job, ready.tunable, history[-1]
    # a task has a plan, and a whole model is what it is
    described = setting.description(ready.method if tunable.file == "trained" else None)
    size = tunable.save(folder[tunable.file], described.to_json())
    best_file = save_best(tunable, folder, best, last.iteration, described.to_json())
    by_iteration = {row.iteration: row.val_miou for row in history}
    run.log.start("testing", len(setting.validation))
    scores = evaluate_scenes(
        tunable.model,
        setting.validation,
        setting.form,
        setting.device,
        multi_scale=multi_scale,
        amp=job.recipe.amp,
        save_to=save_predictions,
        workers=setting.workers,
        progress=run.log,
    )
    _draw(folder, job, ready.plan, history)
    result = {
        "method": job.method.name,
        **scores.to_json(),
        "train_loss": last.train_loss,
        "iterations": last.iteration,
        "stopped_early": last.iteration < job.recipe.iterations,
        "val_miou": last.val_miou,
        "best_iteration": None if best is None else best.epoch,
        "best_val_miou": None if best is None else by_iteration[best.epoch],
        "best_file": best_file,
        "trained_parameters": tunable.trained,
        **ready.facts,
        "recompute": job.recipe.recompute,
        "file": folder[tunable.file].name,
        "task_bytes": size,
        "step_ms": median_step_ms(history),
        "seconds": round(run.clock(), 1),
        "accounted_peak_bytes": ready.accounted_bytes,
        "measured_peak_bytes": measured_bytes(setting.device),
        **machine_of(setting.device),
    }
    run.finish(result)
    return result


def _measured(run: Run[SegmentationSetting], method: Method) -> Sensitivity:
    """The sensitivity that was measured into the folder before, or else now."""
    setting = run.setting

    def measure() -> Sensitivity:
        model = setting.base.model.to(setting.device)
        try:
            measured = measure_on(
                model,
                setting.crops(),
                nn.CrossEntropyLoss(ignore_index=IGNORED),
                min(method.samples, len(setting.training)),
                method,
                setting.job.recipe.seed,
                run.log,
            )
        except NoSamples as reason:
            raise ValueError(NO_LABEL) from reason
        model.to("cpu")
        return measured

    measured = measured_once(run, setting.evidence(method), measure)
    assert measured is not None  # there is but one process
    return measured


def _train(
    run: Run[SegmentationSetting],
    tunable: Tunable,
    graph: bool | None,
    report_every: int,
    on_report: Callable[[IterationFigures], object] | None,
    events: EventFiles | None,
) -> tuple[list[IterationFigures], Best | None]:
    """The figures of all iterations, and what was trained by the best."""
    setting, recipe = run.setting, run.setting.job.recipe
    best = BestSoFar()
    held_out = setting.held_out

    def keep(rows: list[IterationFigures]) -> None:
        run.folder.write_lines("metrics", [asdict(row) for row in rows])
        run.note_seconds()
        if events is not None:
            events.write(rows)

    def look() -> float:
        assert held_out is not None
        scores = evaluate_scenes(
            tunable.model,
            held_out,
            setting.form,
            setting.device,
            amp=recipe.amp,
            workers=setting.workers,
        )
        miou = scores.single.mean_iou
        if miou is None:
            raise ValueError(no_label_held_out(held_out))
        return miou

    # afresh, so that training is the same whether sensitivities were measured or found on disk
    seed_everything(recipe.seed)
    history = train_segmentation(
        tunable.model,
        setting.crops(),
        recipe,
        lr=recipe.peak_lr(setting.job.method),
        checkpoint=run.folder["checkpoint"],
        checkpoint_seconds=run.checkpoint_seconds,
        on_figures=keep,
        on_new_figures=on_report,
        look=None if held_out is None else look,
        best=best,
        graph=graph,
        progress=run.log,
        report_every=report_every,
    )
    return history, best.best


def _draw(
    folder: RunFolder, job: SegmentationJob, plan: Plan | None, history: list[IterationFigures]
) -> None:
    if plan is not None and plan.selected:
        save_picture(sensitivity_figure(plan), folder["sensitivity_picture"])
    rows = [{"epoch": row.iteration, "train_loss": row.train_loss} for row in history]
    title = f"{job.model.name}, {job.method.name}"
    curves = training_curves_figure(rows, title=title, unit="iteration")
    save_picture(curves, folder["curves_picture"])
