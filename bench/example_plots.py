"""Draws the examples of docs/PICTURES.md from real tasks: `python -m bench.example_plots`.

Six tasks of scikit-learn's handwritten digits, on the demo's base model, which has seen the digits
0 to 4, and on the same model untrained; and runs of a few methods on the first task, three seeds
each. All are small, so that the command takes minutes; what the pictures show is of these tasks,
and nothing in them is made up.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from spt_kernels import plots
from spt_kernels.files.picture import save_picture
from spt_kernels.finetuning import FinetuneJob, ImageSource, Method, ModelSource, Recipe, finetune
from spt_kernels.finetuning.base.models import build
from spt_kernels.finetuning.demo import ARCHITECTURE, BASE, FORM, SHAPE, TRAIN_IMAGES, one_thread
from spt_kernels.finetuning.images.digits import split_digits
from spt_kernels.finetuning.preparation.measured import sensitivity_of
from spt_kernels.finetuning.progress import Silent
from spt_kernels.finetuning.run.setting import open_setting
from spt_kernels.plan import Plan, allocate
from spt_kernels.sensitivity import Sensitivity

FOLDER = Path(__file__).parent.parent / "docs" / "plots"
DPI = 160  # of the examples alone: they are shown small
EPOCHS, SEEDS, RANK, BUDGET = 30, range(3), 2, 0.04
OLD_AND_NEW, NEW = range(10), range(5, 10)

_NOISE = np.random.default_rng(0)
# What is done to each image of the digits 5 to 9, and for parity to each of 0 to 9
TASKS: dict[str, Callable[[Any], Any]] = {
    "digits": lambda image: image,
    "rotated": np.rot90,
    "mirrored": np.fliplr,
    "inverted": lambda image: 255 - image,
    "noisy": lambda image: np.clip(image + _NOISE.normal(0, 60, image.shape), 0, 255),
    "parity": lambda image: image,
}


def write_task(root: Path, name: str) -> ImageSource:
    """Write the images of a task as a folder per class."""
    is_parity = name == "parity"
    for split, digit, pixels in split_digits(OLD_AND_NEW if is_parity else NEW, 0.5):
        folder = root / split / (("even", "odd")[digit % 2] if is_parity else str(digit))
        folder.mkdir(parents=True, exist_ok=True)
        for place, image in enumerate(pixels):
            changed = np.ascontiguousarray(TASKS[name](image)).astype(np.uint8)
            Image.fromarray(changed).save(folder / f"{digit}-{place:04}.png")
    return ImageSource(str(root), train_images=TRAIN_IMAGES, val_share=0.0)


def job_of(weights: Path, images: ImageSource, method: Method, seed: int = 0) -> FinetuneJob:
    """A run of the demo's recipe, shorter."""
    model = ModelSource(ARCHITECTURE, SHAPE, str(weights), new_head=True)
    return FinetuneJob(model, images, method, Recipe(epochs=EPOCHS, seed=seed), FORM)


def measured(weights: Path, images: ImageSource) -> Sensitivity:
    """The sensitivity of a task, on its training images."""
    setting = open_setting(job_of(weights, images, Method()), "cpu")
    return sensitivity_of(setting, setting.training_batches(Silent()), Silent())


def methods() -> Iterator[Method]:
    """What the runs are of: sizes for the budget, kinds for the structure, samples."""
    for share in (0.01, 0.02, BUDGET):
        yield Method("spt-lora", budget=share, rank=RANK, samples=TRAIN_IMAGES)
    for rank in (1, 2, 4):
        yield Method(f"lora-{rank}")
    yield Method("linear")
    for name in ("spt-adapter", "spt-lora-structured"):
        yield Method(name, budget=BUDGET, rank=RANK, samples=TRAIN_IMAGES)
    yield Method("spt-unstructured", budget=BUDGET, samples=TRAIN_IMAGES)
    for samples in (50, 100):
        yield Method("spt-lora", budget=BUDGET, rank=RANK, samples=samples)


def run_all(folder: Path, images: ImageSource) -> Path:
    """All runs, as a benchmark leaves them."""
    for number, method in enumerate(methods()):
        for seed in SEEDS:
            finetune(
                job_of(BASE, images, method, seed),
                folder / "digits" / f"{number}-{method.name}" / f"seed{seed}",
                device="cpu",
                progress=Silent(),
            )
    return folder


def is_usual(run: Any) -> bool:
    """Whether a run was measured on all training images, or on none."""
    return run.settings["samples"] == TRAIN_IMAGES or not run.method.startswith("spt-")


def figures(folder: Path) -> Iterator[tuple[str, Any]]:
    """Name and figure of each example."""
    untrained = folder / "untrained.safetensors"
    save_file(build(ModelSource(ARCHITECTURE, SHAPE), 5, seed=0).model.state_dict(), untrained)
    images = {name: write_task(folder / "images" / name, name) for name in TASKS}
    tasks: dict[str, dict[str, Plan | Sensitivity]] = {
        pretraining: {name: measured(weights, own) for name, own in images.items()}
        for pretraining, weights in (("digits 0 to 4", BASE), ("untrained", untrained))
    }
    on_digits = tasks["digits 0 to 4"]
    first = on_digits["digits"]
    assert isinstance(first, Sensitivity)
    plan = allocate(first, BUDGET, rank=RANK)
    yield "allocation", plots.allocation_figure(plots.allocation(plan))
    for axis in ("block", "operation"):
        yield f"{axis}s", plots.shares_figure(plots.task_shares(on_digits, axis, BUDGET))
    yield "pretraining", plots.pretraining_figure(plots.variance_over_tasks(tasks, BUDGET))
    yield "overlap", plots.overlap_figure(plots.selection_overlap(on_digits, BUDGET))

    runs = plots.read_runs([run_all(folder / "runs", images["digits"])]).runs
    usual = [run for run in runs if is_usual(run)]
    of_size = [run for run in usual if run.method.startswith(("lora", "linear", "spt-lora"))]
    of_size = [run for run in of_size if run.method != "spt-lora-structured"]
    yield "budget", plots.budget_figure(plots.accuracy_by_budget(of_size))
    at_budget = [run for run in usual if run.settings["budget"] == BUDGET]
    yield "structure", plots.structure_figure(plots.structure_ablation(at_budget))
    at_budget = [r for r in runs if (r.method, r.settings["budget"]) == ("spt-lora", BUDGET)]
    yield "samples", plots.samples_figure(plots.samples_ablation(at_budget))


def main() -> None:
    """Make them all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="for the pictures")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, one_thread():
        for name, figure in figures(Path(folder)):
            figure.set_dpi(DPI)
            save_picture(figure, given.output / f"{name}.png")
            print(given.output / f"{name}.png")


if __name__ == "__main__":
    main()
