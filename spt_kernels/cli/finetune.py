"""`spt-kernels finetune`: images in, a task file out."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command import named_of
from .options import FormOptions, ImageOptions, MachineOptions, ModelOptions, described
from .terminal import Terminal, count, facts, percent, size
from .training_options import MethodOptions, RecipeOptions

if TYPE_CHECKING:
    from ..finetuning.job import FinetuneJob

HELP = """Tune a model on your images and keep what it learnt in a small file.

Images in photos/train/<class>/ and photos/test/<class>/:

  spt-kernels finetune -m vit_base_patch16_224 --pretrained \\
      -d photos -o runs/photos

Weights of your own, a budget, 1,000 images of four classes:

  spt-kernels finetune -m vit_base_patch16_224 -w vit.safetensors \\
      -d photos --classes frog,horse,ship,truck --train-images 1000 \\
      --budget 0.4M -o runs/four

Something to compare with, at the same budget:

  spt-kernels finetune … --method lora --budget 0.4M -o runs/lora

After a kill, the same command with --resume, or just:

  spt-kernels finetune --resume -o runs/photos

The output folder gets task.safetensors, or trained.safetensors of a method
without a plan, or model.safetensors where all is trained; the plan and the
sensitivity where there are such; metrics.jsonl, result.json, config.json and
pictures.
"""

_RUN = "Run"


def run(
    terminal: Terminal,
    context: typer.Context,
    model: ModelOptions,
    images: ImageOptions,
    what: MethodOptions,
    sensitivity: Annotated[
        Path | None, described("Method", "--sensitivity FILE", "Measured before; not again.")
    ] = None,
    plan: Annotated[
        Path | None, described("Method", "--plan FILE", "Made before; not again.")
    ] = None,
    *,
    recipe: RecipeOptions,
    form: FormOptions,
    output: Annotated[Path, described(_RUN, "--output -o FOLDER", "Where all results go.")],
    resume: Annotated[
        bool, described(_RUN, "--resume", "Go on with a run that was killed.")
    ] = False,
    force: Annotated[
        bool, described(_RUN, "--force", "Overwrite the run in the output folder.")
    ] = False,
    checkpoint_every: Annotated[
        float, described(_RUN, "--checkpoint-every SECONDS", "At an epoch's end [60].")
    ] = 60.0,
    graph: Annotated[
        bool | None,
        described(_RUN, "--graph/--no-graph", "Steps as CUDA graphs [on a card, where they can]."),
    ] = None,
    machine: MachineOptions,
) -> None:
    """Collect the job, run it, show its figures."""
    groups = (model, images, what, recipe, form)
    named = {f.name for group in groups for f in fields(group)} | {"sensitivity", "plan"}
    is_bare_resume = resume and not named_of(context, named)
    job = _job_in(output) if is_bare_resume else _job(*groups, sensitivity, plan)
    from ..finetuning.pipeline import finetune

    with terminal.progress() as progress:
        result = finetune(
            job,
            output,
            resume=resume,
            force=force,
            device=machine.device,
            workers=machine.workers,
            checkpoint_seconds=checkpoint_every,
            graph=graph,
            progress=progress,
        )
    terminal.show({"output": str(output), **result}, facts(_lines(result, output)))


def _job(
    model: ModelOptions,
    images: ImageOptions,
    what: MethodOptions,
    recipe: RecipeOptions,
    form: FormOptions,
    sensitivity: Path | None,
    plan: Path | None,
) -> FinetuneJob:
    from ..finetuning.job import FinetuneJob

    # method and recipe first: they are checked without a look at any file
    method, how = what.chosen(), recipe.chosen()
    source = model.source()
    if source is None:
        raise ValueError("--model: name a timm architecture")
    return FinetuneJob(
        source,
        images.source(),
        method,
        how,
        form.overrides() | ({"augment": recipe.augment} if recipe.augment else {}),
        str(sensitivity.resolve()) if sensitivity is not None else None,
        str(plan.resolve()) if plan is not None else None,
    )


def _job_in(folder: Path) -> FinetuneJob:
    from ..finetuning.job import FinetuneJob
    from ..finetuning.run_folder import RunFolder

    config = RunFolder(folder).read_json("config")
    if config is None:
        raise ValueError(
            f"--resume: no run in {folder}; give the model and the images to start one"
        )
    return FinetuneJob.from_json(config["job"])


def _lines(result: dict[str, Any], output: Path) -> list[tuple[str, str]]:
    trained, backbone = result["trained_parameters"], result["backbone_parameters"]
    head = ", ".join(result["head"]) or "none"
    parts = f"{percent(trained / backbone, 2)} of the backbone, and a head ({head}) of "
    lines = [
        ("method", result["method"]),
        ("trained parameters", f"{count(trained)} ({parts}{count(result['head_parameters'])})"),
        ("test accuracy", percent(result["test_accuracy"])),
        ("validation accuracy", percent(result["val_accuracy"])),
        ("step", f"{result['step_ms']:.0f} ms"),
        ("peak memory, accounted", size(result["accounted_peak_bytes"])),
    ]
    if result["measured_peak_bytes"] is not None:
        lines.append(("peak memory, measured", size(result["measured_peak_bytes"])))
    return [*lines, (result["file"], f"{size(result['task_bytes'])}, in {output}")]
