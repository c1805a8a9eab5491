"""`spt-kernels finetune`: images in, a task file out."""

from __future__ import annotations

import contextlib
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..finetuning.job.recipe import HOW_IT_FITS
from .command import named_of
from .launched import launched, sharing
from .options import FormOptions, ImageOptions, MachineOptions, ModelOptions, described
from .terminal import Terminal, best_told, count, facts, percent, size
from .training_options import TENSORBOARD, GivenOptions, MethodOptions, RecipeOptions, RunOptions

if TYPE_CHECKING:
    from ..finetuning.job.job import FinetuneJob

HELP = """Tune a model on your images and keep what it learnt in a small file.

Images in photos/train/<class>/ and photos/test/<class>/:

  spt-kernels finetune -m vit_base_patch16_224 --pretrained \\
      -d photos -o runs/photos

Weights of your own, a budget, 1,000 images of four classes:

  spt-kernels finetune -m vit_base_patch16_224 -w vit.safetensors \\
      -d photos --classes frog,horse,ship,truck --train-images 1000 \\
      --budget 0.4M -o runs/four

Which method: spt-lora when in doubt; it merges into the model, so that
inference costs what it did. spt-unstructured takes the least memory, and
merges too. spt-adapter does not merge. full, linear, bias and lora are there
to compare with. Which budget: 0.5% is about the paper's 0.4M of a ViT-B/16;
less may do where classes or images are few, more may help where images are
unlike those that the model knows. Which rank: a smaller one makes a LoRA or
Adapter cheaper, so that more matrices get one; what a plan comes to is seen
beforehand with `spt-kernels sensitivity` and `spt-kernels plan`.

Something to compare with, at the same budget:

  spt-kernels finetune … --method lora --budget 0.4M -o runs/lora

A data set as its authors share it, by the paper's recipe for such:

  spt-kernels finetune … -d CUB_200_2011 --layout cub-200-2011 \\
      --recipe paper-fgvc -o runs/birds

NOAH, which searches for the best sizes of prompts, Adapters and LoRA by the
validation images, and takes its time:

  spt-kernels finetune … --method noah -o runs/noah

After a kill, the same command with --resume, or just the first of these;
the second goes on in less memory, the third makes a finished run longer:

  spt-kernels finetune --resume -o runs/photos
  spt-kernels finetune --resume -o runs/photos --memory 6GiB
  spt-kernels finetune --resume -o runs/photos --epochs 200

On several cards or machines, each with a share of every batch:

  torchrun --nproc-per-node 2 -m spt_kernels finetune … -o runs/photos

The output folder gets task.safetensors, or trained.safetensors of a method
without a plan, or model.safetensors where all is trained, of the last epoch;
best-task.safetensors and so on, where an earlier epoch was better on the
validation images; the plan and the sensitivity where there are such;
metrics.jsonl, result.json, config.json, log.txt, state.pt and pictures.

A plan, or a sensitivity, that is given decides: what contradicts it is refused.
"""

_RUN = "Run"


def run(
    terminal: Terminal,
    context: typer.Context,
    model: ModelOptions,
    images: ImageOptions,
    what: MethodOptions,
    given: GivenOptions,
    recipe: RecipeOptions,
    form: FormOptions,
    running: RunOptions,
    checkpoint_seconds: Annotated[
        float, described(_RUN, "--checkpoint-every SECONDS", "At an epoch's end [60].")
    ] = 60.0,
    tensorboard: Annotated[bool, TENSORBOARD] = False,
    deterministic: Annotated[
        bool,
        described(_RUN, "--deterministic", "The same bits each time on a card too, or an error."),
    ] = False,
    *,
    machine: MachineOptions,
) -> None:
    """Collect the job, run it, show its figures."""
    groups = (model, images, what, given, recipe, form)
    named = {f.name for group in groups for f in fields(group)}
    is_bare_resume = running.resume and not named_of(context, named - {"epochs", *HOW_IT_FITS})

    def asked() -> FinetuneJob:
        if is_bare_resume:
            return _job_in(running.output, recipe)
        longer = "--epochs, --micro-batch, --recompute, --memory, --offload"
        running.check_whole(model.source(), longer)
        return _job(*groups)

    rank, size = launched()
    job = asked() if size == 1 else None  # a mistake is told before anything heavy is imported
    from ..finetuning.folder.run_folder import RunFolder
    from ..finetuning.pipeline import finetune

    showing = contextlib.nullcontext() if rank else terminal.progress()
    with sharing(machine.device) as processes, showing as progress:
        if job is None:
            # the folder of a run need not be there for all
            job = (processes.from_first if is_bare_resume else processes.together)(asked)
        result = finetune(
            job,
            running.output,
            resume=running.resume,
            force=running.force,
            device=machine.device,
            workers=machine.workers,
            checkpoint_seconds=checkpoint_seconds,
            graph=running.graph,
            deterministic=deterministic,
            progress=progress,
            tensorboard=tensorboard,
            group=processes.group,
        )
    if rank:
        return
    written = RunFolder(running.output).written()
    value = {"output": str(running.output), **result, "written": written}
    lines = [*_lines(result, running.output), ("written", ", ".join(written))]
    terminal.show(value, facts(lines))


def _job(
    model: ModelOptions,
    images: ImageOptions,
    what: MethodOptions,
    given: GivenOptions,
    recipe: RecipeOptions,
    form: FormOptions,
) -> FinetuneJob:
    from ..finetuning.images.splits import may_have_validation
    from ..finetuning.job.job import FinetuneJob

    # method and recipe first: they are checked without a look at any file
    preset = recipe.preset()
    if given.sensitivity is not None:  # which decides, unless an option contradicts it
        others = {name: value for name, value in preset.options.items() if name != "samples"}
        preset = replace(preset, options=others)
    method, how = what.chosen(preset), recipe.chosen()
    method = given.method(what, method)
    source = model.source()
    if source is None:
        raise ValueError("--model: name a timm architecture")
    shown = images.source()
    if recipe.val_every is not None and not may_have_validation(shown):
        raise ValueError(
            "--val-every: there are no validation images to look at; give some, or hold out a "
            "share of the training images (--val-share)"
        )
    return FinetuneJob(
        source,
        shown,
        method,
        how,
        {**preset.form, **form.overrides(), **recipe.overrides()},
        **given.files(),
    )


def _job_in(folder: Path, recipe: RecipeOptions) -> FinetuneJob:
    """The job of the run in a folder, with what of its recipe may be other, where it is given."""
    from ..finetuning.folder.run_folder import RunFolder
    from ..finetuning.job.job import FinetuneJob
    from ..finetuning.run.run import config_in

    found = RunFolder(folder)
    config = config_in(found, FinetuneJob.command)
    if config is None:
        raise ValueError(
            f"--resume: no run in {folder}; give the model and the images to start one"
        )
    job = found.job_of(config, FinetuneJob.from_json)
    return replace(job, recipe=recipe.resumed(job.recipe))


def _lines(result: dict[str, Any], output: Path) -> list[tuple[str, str]]:
    trained, backbone = result["trained_parameters"], result["backbone_parameters"]
    head = ", ".join(result["head"]) or "none"
    parts = f"{percent(trained / backbone, 2)} of the backbone, and a head ({head}) of "
    lines = [
        ("method", result["method"]),
        ("trained parameters", f"{count(trained)} ({parts}{count(result['head_parameters'])})"),
        ("test accuracy", percent(result["test_accuracy"])),
        ("validation accuracy", best_told(result, "val_accuracy", f"epoch {result['best_epoch']}")),
        ("step", f"{result['step_ms']:,.0f} ms"),
        ("peak memory, accounted", size(result["accounted_peak_bytes"])),
    ]
    if result["stopped_early"]:
        lines.insert(1, ("epochs", f"{result['epochs']}, stopped early"))
    if result["measured_peak_bytes"] is not None:
        lines.append(("peak memory, measured", size(result["measured_peak_bytes"])))
    return [*lines, (result["file"], f"{size(result['task_bytes'])}, in {output}")]
