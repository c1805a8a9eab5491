"""`spt-kernels sensitivity`: measure once, plan as often as you like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from .options import FormOptions, ImageOptions, MachineOptions, ModelOptions, described
from .terminal import Terminal, count, facts, percent, size, table
from .training_options import HEAD_HELP, parse_head
from .written import check_file, check_spared

HELP = """Measure how sensitive a task is to each parameter.

The paper's Algorithm 1: the sum over images of the squared gradient.

  spt-kernels sensitivity -m vit_base_patch16_224 --pretrained \\
      -d photos -o photos.sensitivity
  spt-kernels plan photos.sensitivity --budget 0.4M

`finetune` measures by itself; this is for trying several budgets, or for a look.
"""


def run(
    terminal: Terminal,
    model: ModelOptions,
    images: ImageOptions,
    form: FormOptions,
    output: Annotated[Path, described("Run", "--output -o FILE", "Where to write it.")],
    samples: Annotated[
        int, described("Run", "--samples N", "Training images to measure on [800].")
    ] = 800,
    batch_size: Annotated[
        int, described("Run", "--batch-size N", "[64]; does not change the result.")
    ] = 64,
    head: Annotated[list[str] | None, described("Run", "--head NAME", HEAD_HELP)] = None,
    seed: Annotated[int, described("Run", "--seed N", "Of the head and of what is drawn [0].")] = 0,
    force: Annotated[bool, described("Run", "--force", "Overwrite the file.")] = False,
    *,
    machine: MachineOptions,
) -> None:
    """Measure, save, show where the sensitivity lies."""
    check_file("--output", output, force=force)
    from ..finetuning.job.job import FinetuneJob
    from ..finetuning.job.recipe import Recipe
    from ..finetuning.preparation.measured import sensitivity_of
    from ..finetuning.run.setting import open_setting
    from ..methods.method import Method
    from ..model.head import head_line, layers_of, parts_of

    recipe = Recipe(batch_size=batch_size, seed=seed)
    source = model.source()
    if source is None:
        raise ValueError("--model: name a timm architecture")
    check_spared("--output", output, base_weights=source.weights)
    job = FinetuneJob(
        source,
        images.source(),
        Method(samples=samples, head=parse_head(head)),
        recipe,
        form.overrides(),
    )
    setting = open_setting(job, machine.device, machine.workers)
    with terminal.progress() as progress:
        batches = setting.training_batches(progress)
        for note in setting.notes():
            progress.say(note)
        measured = sensitivity_of(setting, batches, progress)
    measured.save(output)
    value = {
        "output": str(output),
        "samples": measured.num_samples,
        "parameters": sum(what.numel for what in measured.info.values()),
        "file_bytes": output.stat().st_size,
        "head": layers_of(measured.head),
        "fallback": list(measured.fallback),
        "idle": parts_of(measured.idle, measured),
        "share_by_operation": _shares(measured),
        "written": [str(output)],
    }
    terminal.show(value, *_parts(value, head_line(measured.head, measured.head_source, measured)))


def _shares(measured: Any) -> dict[str, float]:
    """Share of the summed sensitivity by operation; biases and norms under one word each."""
    sums: dict[str, float] = {}
    for name, scores in measured.items():
        info = measured.info[name]
        for block in info.row_blocks:
            operation = info.kind if info.kind in ("bias", "norm") else block.operation
            part = float(scores[block.start : block.stop].double().sum())
            sums[operation] = sums.get(operation, 0.0) + part
    total = sum(sums.values()) or 1.0
    return {name: part / total for name, part in sums.items()}


def _parts(value: dict[str, Any], head: str) -> list[Any]:
    lines = [
        ("images", count(value["samples"])),
        ("candidate parameters", count(value["parameters"])),
        ("head", head),
        ("file", f"{value['output']}, {size(value['file_bytes'])}"),
    ]
    if value["fallback"]:
        lines.append(("one by one", ", ".join(value["fallback"])))
    if value["idle"]:
        lines.append(("not reached by the loss", ", ".join(value["idle"])))
    shares = sorted(value["share_by_operation"].items(), key=lambda item: -item[1])
    rows = [(name, percent(share)) for name, share in shares]
    return [facts(lines), "", table(("operation", "share of Σ g²"), rows)]
