"""`spt-kernels demo`: the whole job on handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .options import described
from .terminal import Terminal, count, facts, percent, size, table

if TYPE_CHECKING:
    from ..finetuning.demo import DemoResult

HELP = """Four ways to teach new handwritten digits to a small ViT.

It comes with this package and knows the digits 0 to 4. It learns 5 to 9 from
200 images: by its head alone, by LoRA, by SPT-LoRA with as many parameters, and
by full fine-tuning.

  spt-kernels demo
  spt-kernels inspect demo-output/spt-lora-0/task.safetensors

About two minutes on two cores; nothing is downloaded.
"""


def run(
    terminal: Terminal,
    output: Annotated[
        Path, described("Run", "--output -o FOLDER", "All results [demo-output].")
    ] = Path("demo-output"),
    seeds: Annotated[int, described("Run", "--seeds N", "Runs of each method [3].")] = 3,
    force: Annotated[
        bool, described("Run", "--force", "Overwrite what is in the output folder.")
    ] = False,
) -> None:
    """Run it and show the table."""
    from ..finetuning.demo import check_can_run, run_demo
    from ..finetuning.folder.run_folder import RunFolder

    if seeds < 1:
        raise ValueError(f"--seeds: expected at least one, got {seeds}")
    check_can_run()
    if not force and output.is_dir() and any(output.iterdir()):
        raise ValueError(f"--output: {output} is not empty; --force overwrites what is in it")
    RunFolder.open(output, force=True)  # or refuses
    with terminal.progress() as progress:
        result = run_demo(output, seeds=range(seeds), progress=progress)
    terminal.show({"output": str(output), **result.to_json()}, *_parts(result, output, seeds))


def cells(result: DemoResult) -> list[tuple[str, ...]]:
    """The table, its titles first."""
    titles = ("method", "trained", "accuracy, %", "step, ms", "peak memory*", "task file")
    rows = [
        (
            row.method,
            count(row.trained_parameters),
            f"{100 * row.mean:.1f} ± {100 * row.spread:.1f}",
            f"{row.step_ms:.1f}",
            size(row.accounted_peak_bytes),
            size(row.task_bytes),
        )
        for row in result.rows
    ]
    return [titles, *rows]


def _parts(result: DemoResult, output: Path, seeds: int) -> list[Any]:
    columns, *rows = cells(result)
    check = result.check
    of = f"of {check.images} predictions as before"
    layers = "the plain model's" if check.has_plain_layers else "NOT the plain model's"
    lines = [
        ("base model", f"{percent(result.base_accuracy)} on the digits it knows"),
        ("task file", check.path),
        ("on a fresh base model", f"{check.same_after_loading} {of}"),
        ("merged", f"{check.same_after_merging} {of}; its layers are {layers}"),
        ("picture", str(output / "spt-lora-0" / "sensitivity.png")),
        ("curves", str(output / "curves.png")),
    ]
    note = (
        f"Accuracy on the new digits: mean ± standard deviation of {seeds} seeds. The head is\n"
        "trained in every row and not counted. For full, the task file is the whole model.\n"
        "* of a training step; accounted, not measured."
    )
    return [table(columns, rows), "", note, "", facts(lines)]
