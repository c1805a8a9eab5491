"""`spt-kernels predict`: what is on images."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import MachineOptions, described, split_names
from .saved_options import BatchOptions, SavedFormOptions, SavedOptions
from .scenes import PixelOptions, find_segmentation, label_scenes
from .terminal import Terminal, percent, table, unbroken
from .written import check_file

if TYPE_CHECKING:
    from ..finetuning.results.prediction import Prediction

HELP = """Say what is on images: the most probable classes of each.

By the model of a run, a task file that came alone, a merged model:

  spt-kernels predict runs/photos new-photos
  spt-kernels predict photos.safetensors a.jpg b.jpg --top 1
  spt-kernels predict merged.safetensors new-photos --csv seen.csv

Of a folder, images at any depth are taken. The CSV has the columns image,
rank, class, probability, and a line for each of --top classes.

Of a model that labels pixels (`spt-kernels segment`), label maps:

  spt-kernels predict runs/ade new-photos --save-predictions labels
"""

# what says something of images, not of their pixels
_OF_IMAGES = (*("classes", "top", "csv", "batch_size"), *(f.name for f in fields(SavedFormOptions)))


def run(
    terminal: Terminal,
    context: typer.Context,
    task: Annotated[
        Path,
        typer.Argument(help="A run's folder, a task file, a merged model.", metavar="RUN"),
    ],
    images: Annotated[
        list[Path], typer.Argument(help="Images, and folders of them.", metavar="IMAGE|FOLDER")
    ],
    classes: Annotated[
        str | None,
        described(
            "Images",
            "--classes A,B,…",
            "Of a model that does not tell its classes, in the order of its head [numbers].",
        ),
    ] = None,
    *,
    model: SavedOptions,
    form: SavedFormOptions,
    batch: BatchOptions,
    machine: MachineOptions,
    top: Annotated[int, described("Output", "--top K", "So many classes of each image [3].")] = 3,
    csv: Annotated[Path | None, described("Output", "--csv FILE", "Write them as a table.")] = None,
    force: Annotated[bool, described("Output", "--force", "Overwrite such files.")] = False,
    pixels: PixelOptions,
) -> None:
    """Find the model, load it, look at the images, show what was seen."""
    if top < 1:
        raise ValueError(f"--top: expected at least 1, got {top}")
    check_file("--csv", csv, force=force)
    how = batch.how()
    scenes = find_segmentation(context, model, task, _OF_IMAGES)
    if scenes is not None:
        label_scenes(terminal, scenes, images, machine, pixels, amp=how["amp"], force=force)
        return
    from ..files.atomic import write_atomically
    from ..finetuning.results.prediction import as_csv, predict

    saved = model.find(task)
    if not saved.classes and not classes:
        terminal.note("the model does not tell its classes: --classes names them")
    with terminal.progress() as progress:
        seen = predict(
            saved,
            images,
            top=top,
            classes=split_names(classes, "--classes"),
            form=form.overrides(),
            device=machine.device,
            workers=machine.workers,
            progress=progress,
            **how,
        )
    parts = [_table(seen)]
    if csv is not None:
        write_atomically(csv, as_csv(seen).encode(errors="surrogateescape"))
        parts.append(f"written to {csv}")
    terminal.show(_value(seen), *parts)


def _value(predictions: list[Prediction]) -> dict[str, Any]:
    return {
        "images": [
            {
                "image": str(seen.image),
                "classes": [
                    {"class": name, "probability": share}
                    for name, share in zip(seen.classes, seen.probabilities, strict=True)
                ],
            }
            for seen in predictions
        ]
    }


def _table(predictions: list[Prediction]) -> Any:
    rows = []
    for seen in predictions:
        (name, *others), (share, *shares) = seen.classes, seen.probabilities
        then = ", ".join(unbroken(f"{n} {percent(s)}") for n, s in zip(others, shares, strict=True))
        rows.append((str(seen.image), percent(share), name + (f" ({then})" if then else "")))
    return table(("image", "probability", "class"), rows, has_prose=True)
