"""`spt-kernels evaluate`: how often a tuned model is right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import FormOptions, MachineOptions, ModelOptions, described, split_names
from .terminal import Terminal, count, percent, table

if TYPE_CHECKING:
    from ..finetuning.saved_run import SavedRun

HELP = """Count how often a tuned model is right.

The model, its weights and the test images are those of the run:

  spt-kernels evaluate runs/photos

Other images (a folder per class), or a task file that came alone:

  spt-kernels evaluate runs/photos -d new-photos
  spt-kernels evaluate photos.safetensors -m vit_base_patch16_224 \\
      -w vit.safetensors -d new-photos
"""


def run(
    terminal: Terminal,
    task: Annotated[Path, typer.Argument(help="A run's folder, or a task file.", metavar="RUN")],
    model: ModelOptions,
    form: FormOptions,
    machine: MachineOptions,
    data: Annotated[
        Path | None,
        described(
            "Images", "--data -d FOLDER", "Its test/ if it has one, else itself [the run's]."
        ),
    ] = None,
    test_list: Annotated[
        Path | None, described("Images", "--test-list FILE", "Lines 'path label', from --data.")
    ] = None,
    classes: Annotated[
        str | None, described("Images", "--classes A,B,…", "In the order of the head [the run's].")
    ] = None,
    batch_size: Annotated[int, described("Run", "--batch-size N", "[64]")] = 64,
    amp: Annotated[str, described("Run", "--amp NAME", "none or bf16 [none].")] = "none",
) -> None:
    """Find the run, load it, evaluate it, show the accuracy."""
    from ..finetuning.accuracy import evaluate
    from ..finetuning.device import pick_device
    from ..finetuning.models import preprocessing_of
    from ..finetuning.pixels import Batches, PixelSet, Preprocessing
    from ..finetuning.recipe import PRECISIONS
    from ..finetuning.saved_run import SavedRun

    if amp not in PRECISIONS:
        raise ValueError(f"--amp: expected one of {', '.join(PRECISIONS)}, got {amp!r}")
    if batch_size < 1:
        raise ValueError(f"--batch-size: expected more than zero, got {batch_size}")
    device = pick_device(machine.device)
    saved = SavedRun.find(task, model.source())
    tuned = saved.load().to(device)
    overrides = form.overrides() | {"augment": "none"}
    if saved.form is None:
        shape = preprocessing_of(tuned, **overrides)
    else:
        shape = Preprocessing(**{**vars(saved.form), **overrides})
    images = _images(saved, data, test_list, split_names(classes))
    with terminal.progress() as progress:
        pixels = PixelSet(images, shape).preload(machine.workers, progress)
        progress.start("evaluating", len(pixels))
        batches = Batches(pixels, batch_size, device, workers=machine.workers)
        seen = evaluate(tuned, batches, amp=amp, on_batch=progress.advance)
    value = {
        "accuracy": seen.top1,
        "correct": seen.correct,
        "total": seen.total,
        "loss": seen.loss,
        "classes": {
            name: {"correct": right, "total": total}
            for name, right, total in zip(
                images.classes, seen.correct_by_class, seen.total_by_class, strict=False
            )
        },
    }
    terminal.show(value, _table(value))


def _images(
    saved: SavedRun, data: Path | None, test_list: Path | None, classes: tuple[str, ...]
) -> Any:
    from ..finetuning.splits import read_evaluation_images

    names = classes or saved.classes or None
    if names is not None and len(names) != saved.num_classes:
        raise ValueError(f"--classes: the head has {saved.num_classes}, got {len(names)}")
    source = saved.job.images if saved.job is not None else None
    root = data if data is not None or source is None else source.root
    if root is None:
        raise ValueError("--data: name the folder of the images")
    listed = test_list
    if data is None and test_list is None and source is not None and source.test_list is not None:
        listed = Path(source.test_list)
    images = read_evaluation_images(root, names, listed)
    if len(images.classes) != saved.num_classes:
        raise ValueError(f"--data: the head has {saved.num_classes} classes, {root} has others")
    return images


def _table(value: dict[str, Any]) -> Any:
    rows = [
        (
            name,
            percent(seen["correct"] / seen["total"]) if seen["total"] else "–",
            count(seen["total"]),
        )
        for name, seen in value["classes"].items()
    ]
    rows.append(("all", percent(value["accuracy"]), count(value["total"])))
    return table(("class", "accuracy", "images"), rows)
