"""`spt-kernels evaluate`: how often a tuned model is right."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Mapping
from csv import writer as csv_writer
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files.atomic import write_atomically
from .options import MachineOptions, described, split_names
from .saved_options import BatchOptions, SavedFormOptions, SavedOptions
from .scenes import PixelOptions, evaluate_scenes, find_segmentation
from .terminal import Terminal, count, percent, table, unbroken
from .written import check_apart, check_file, check_picture

if TYPE_CHECKING:
    from ..finetuning.images.labelled import LabelledImages
    from ..finetuning.training.accuracy import Accuracy

HELP = """Count how often a tuned model is right, and what it takes for what.

The model, its weights and the test images are those of the run:

  spt-kernels evaluate runs/photos

Other images (a folder per class); a task file that came alone, which tells
its model and its classes; a merged model; who is taken for whom:

  spt-kernels evaluate runs/photos -d new-photos
  spt-kernels evaluate photos.safetensors -w vit.safetensors -d new-photos
  spt-kernels evaluate merged.safetensors -d new-photos
  spt-kernels evaluate runs/photos --confusion confusion.png

Classes are matched by name, whatever their order; images of a class that the
model does not know are refused. --json has the whole confusion of 100 classes
at most, and of any the pairs that are confused most; a table of all pairs:

  spt-kernels evaluate runs/photos --csv confusion.csv

Of a model that labels pixels (`spt-kernels segment`), the mIoU; what it takes
each pixel for is written as label maps:

  spt-kernels evaluate runs/ade --multi-scale --save-predictions labels
"""

_MOST_CLASSES = 100  # whose square is printed as JSON: of 1,000 it is a million numbers
_MOST_PAIRS = 100  # of classes that are confused

# what says something of images, not of the pixels of a scene
_OF_IMAGES = (
    *("test_list", "classes", "confusion", "csv", "batch_size"),
    *(f.name for f in fields(SavedFormOptions)),
)


def run(
    terminal: Terminal,
    context: typer.Context,
    task: Annotated[
        Path,
        typer.Argument(help="A run's folder, a task file, a merged model.", metavar="RUN"),
    ],
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
        str | None,
        described(
            "Images",
            "--classes A,B,…",
            "Images of these classes alone [all]. Of a model that does not tell its classes: "
            "these, in the order of its head.",
        ),
    ] = None,
    *,
    model: SavedOptions,
    form: SavedFormOptions,
    batch: BatchOptions,
    machine: MachineOptions,
    confusion: Annotated[
        Path | None,
        described("Output", "--confusion FILE", "Draw which class is taken for which, as a.png."),
    ] = None,
    csv: Annotated[
        Path | None,
        described("Output", "--csv FILE", "Write which class is taken for which, how often."),
    ] = None,
    force: Annotated[bool, described("Output", "--force", "Overwrite such files.")] = False,
    pixels: PixelOptions,
) -> None:
    """Find the run, load it, evaluate it, show the accuracy."""
    check_apart(confusion=confusion, csv=csv)
    check_picture("--confusion", confusion, force=force)
    check_file("--csv", csv, force=force)
    how = batch.how()
    scenes = find_segmentation(context, model, task, _OF_IMAGES)
    if scenes is not None:
        evaluate_scenes(terminal, scenes, data, machine, pixels, amp=how["amp"], force=force)
        return
    from ..finetuning.results.evaluation import evaluate_saved, images_of

    saved = model.find(task)
    images = images_of(saved, data, test_list, split_names(classes, "--classes"))
    if not saved.classes and not classes:
        names = ", ".join(images.classes)
        terminal.note(f"the model does not tell its classes; taken for them, in order: {names}")
    with terminal.progress() as progress:
        seen = evaluate_saved(
            saved,
            images,
            form=form.overrides(),
            device=machine.device,
            workers=machine.workers,
            progress=progress,
            **how,
        )
    if confusion is not None:
        from ..files.picture import save_picture
        from ..finetuning.results.confusion import confusion_figure

        save_picture(confusion_figure(seen.confusion(), images.classes), confusion)
    if csv is not None:
        write_atomically(csv, _csv(seen, images.classes).encode(errors="surrogateescape"))
    if terminal.as_json:
        terminal.show(_value(seen, images, is_known=bool(saved.classes)))
        return
    written = [f"written to {path}" for path in (confusion, csv) if path is not None]
    terminal.show({}, _table(seen, images), *written)


def _value(seen: Accuracy, images: LabelledImages, is_known: bool) -> dict[str, Any]:
    by_class = zip(seen.correct_by_class, seen.total_by_class, seen.by_class, strict=True)
    names = images.classes
    wrong = [row for row in seen.taken_for() if row[0] != row[1]]
    return {
        "accuracy": seen.top1,
        "mean_class_accuracy": seen.class_mean,
        "correct": seen.correct,
        "total": seen.total,
        "loss": seen.loss,
        "classes_are_the_models": is_known,
        "classes": {
            name: {"correct": right, "total": total, "accuracy": share}
            for name, (right, total, share) in zip(names, by_class, strict=True)
        },
        "confused": [
            {"class": names[label], "taken_for": names[chosen], "images": number}
            for label, chosen, number in wrong[:_MOST_PAIRS]
        ],
        "confusion": seen.confusion() if len(names) <= _MOST_CLASSES else None,
    }


def _csv(seen: Accuracy, names: tuple[str, ...]) -> str:
    """A line for each pair of classes that there is an image of, right answers among them."""
    text = io.StringIO()
    writer = csv_writer(text, lineterminator="\n")
    writer.writerow(("class", "taken for", "images"))
    writer.writerows((names[label], names[chosen], n) for label, chosen, n in seen.taken_for())
    return text.getvalue()


def _table(seen: Accuracy, images: LabelledImages) -> Any:
    # not the square of the classes, which may be very many
    wrong: dict[int, Counter[int]] = defaultdict(Counter)
    for label, chosen in zip(seen.labels, seen.predictions, strict=True):
        if chosen != label:
            wrong[label][chosen] += 1
    rows = [
        (name, percent(share), count(total), _taken_for(wrong.get(label, {}), images.classes))
        for label, (name, share, total) in enumerate(
            zip(images.classes, seen.by_class, seen.total_by_class, strict=True)
        )
    ]
    rows.append(("mean of the classes", percent(seen.class_mean), "", ""))
    rows.append(("all", percent(seen.top1), count(seen.total), ""))
    return table(("class", "accuracy", "images", "taken for"), rows, has_prose=True)


def _taken_for(wrong: Mapping[int, int], names: tuple[str, ...]) -> str:
    """The classes that most of the wrong answers were, with how many."""
    most = sorted(wrong, key=lambda label: (-wrong[label], label))
    parts = [unbroken(f"{names[label]} {wrong[label]:,}") for label in most[:3]]
    return ", ".join([*parts, "…"] if len(most) > 3 else parts)
