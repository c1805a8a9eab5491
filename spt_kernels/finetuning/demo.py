"""The demo: a small ViT that knows the digits 0 to 4 learns 5 to 9, by four methods.

The base model's weights come with the package (`python -m bench.demo_base` made them), so that all
start from the same. Each choice has a reason other than what the table then shows:

- the recipe is the paper's, and the same in every row; also full fine-tuning has the paper's peak
  learning rate, at which the base model was trained;
- the rival is LoRA as published, rank 8 on query and value;
- SPT-LoRA, also of rank 8, gets as many parameters as that LoRA, to the last one;
- 200 training images, 40 of each digit, are few, as in the paper's VTAB-1k, and the base model has
  seen several times as many, none of them of the new digits.

Every run has one thread of its own, and as many run at a time as there are cores.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files.atomic import write_atomically
from ..files.picture import check_can_draw, save_picture
from ..methods import Method, make_plan
from ..task import merge
from .base.models import ModelSource, build, preprocessing_of
from .device import own_cores, pick_device
from .folder.run_folder import RunFolder
from .images.digits import read_digits, write_digits
from .images.pixels import Batches, PixelSet
from .images.splits import ImageSource, read_evaluation_images
from .job.job import FinetuneJob
from .job.recipe import Recipe
from .pipeline import finetune
from .progress import Progress, Silent
from .results.curves import training_curves_figure
from .run.saved_run import SavedRun
from .training.accuracy import evaluate

OLD, NEW = range(5), range(5, 10)
SEEDS = (0, 1, 2)
ARCHITECTURE = "vit_tiny_patch16_224"
SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "depth": 4, "num_heads": 3}
FORM = {"mean": (0.5,), "std": (0.5,)}
RECIPE = Recipe(lr=1e-3, val_every=5)
TRAIN_IMAGES = 200
OLD_TEST_SHARE, NEW_TEST_SHARE = 0.2, 0.5
BASE = Path(__file__).with_name("demo_base.safetensors")


@dataclass(frozen=True)
class DemoRow:
    """One method, over all seeds.

    Attributes:
        method: its name.
        trained_parameters: beside the head.
        accuracies: on the test images, one per seed.
        step_ms: median over the seeds.
        accounted_peak_bytes: of a training step.
        task_bytes: of the task file, or of the whole model for full fine-tuning.
    """

    method: str
    trained_parameters: int
    accuracies: tuple[float, ...]
    step_ms: float
    accounted_peak_bytes: int
    task_bytes: int

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation of the accuracies."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


@dataclass(frozen=True)
class TaskCheck:
    """What became of the task file of one SPT-LoRA run.

    Attributes:
        path: the file.
        images: test images that were predicted anew.
        same_after_loading: how many predictions the file on a fresh base model gives as before.
        same_after_merging: how many the merged model gives as before.
        has_plain_layers: whether the merged model's modules are the plain one's, by name and type.
    """

    path: str
    images: int
    same_after_loading: int
    same_after_merging: int
    has_plain_layers: bool


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        base_accuracy: of the base model on the digits it was trained on.
        rows: one per method.
        check: of the task file.
    """

    base_accuracy: float
    rows: tuple[DemoRow, ...]
    check: TaskCheck

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        rows = [asdict(r) | {"mean_accuracy": r.mean, "spread": r.spread} for r in self.rows]
        return {"base_accuracy": self.base_accuracy, "rows": rows, "check": asdict(self.check)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> DemoResult:
        """The inverse of `to_json`."""
        names = [field.name for field in fields(DemoRow)]
        rows = [{name: row[name] for name in names} for row in value["rows"]]
        return DemoResult(
            value["base_accuracy"],
            tuple(DemoRow(**{**row, "accuracies": tuple(row["accuracies"])}) for row in rows),
            TaskCheck(**value["check"]),
        )


def run_demo(
    output: str | Path,
    *,
    seeds: Sequence[int] = SEEDS,
    recipe: Recipe = RECIPE,
    processes: int | None = None,
    progress: Progress | None = None,
) -> DemoResult:
    """Run the demo in the folder `output`, overwriting an earlier one.

    Args:
        output: gets the digits, the base model's weights, a run folder of each method and seed, and
            `result.json` and `curves.png` over all of them.
        seeds: each draws other training images, another head, another order.
        recipe: of every run; its seed is set from `seeds`.
        processes: runs at a time, by default one per core; 1 runs them in this process. With more,
            call it from under `if __name__ == "__main__":`, as for any process pool.
        progress: told how far it is.

    Raises:
        MissingExtra: a package that it needs is not installed; nothing is written then.
    """
    check_can_run()
    progress = progress or Silent()
    output = Path(output)
    write_digits(output / "digits" / "old", OLD, OLD_TEST_SHARE)
    write_digits(output / "digits" / "new", NEW, NEW_TEST_SHARE)
    processes = processes or own_cores()
    weights = output / "base.safetensors"  # what is in `output` is whole without the package
    write_atomically(weights, BASE.read_bytes())
    base = ModelSource(ARCHITECTURE, SHAPE, weights=str(weights.resolve()))
    base_accuracy = _base_accuracy(base, output / "digits" / "old")
    source = replace(base, new_head=True)
    new = (output / "digits" / "new").resolve()
    images = ImageSource(str(new), train_images=TRAIN_IMAGES)
    jobs = {
        f"{method.name}-{seed}": FinetuneJob(
            source, images, method, replace(recipe, seed=seed), FORM
        )
        for method in _methods(source)
        for seed in seeds
    }
    results = _run_all(jobs, output, processes, progress)
    names = dict.fromkeys(job.method.name for job in jobs.values())
    rows = [_row(name, [results[f"{name}-{seed}"] for seed in seeds]) for name in names]
    histories = {
        name: [RunFolder(output / f"{name}-{seed}").read_lines("metrics") for seed in seeds]
        for name in names
    }
    title = f"A small ViT learns the digits 5 to 9 from {TRAIN_IMAGES} images"
    save_picture(training_curves_figure(histories, title=title), output / "curves.png")
    check = check_task(output / f"spt-lora-{seeds[0]}")
    result = DemoResult(base_accuracy, tuple(rows), check)
    RunFolder(output).write_json("result", result.to_json())
    return result


def check_can_run() -> None:
    """Before anything is written.

    Raises:
        MissingExtra: a package that the demo needs is not installed.
    """
    check_can_draw()
    read_digits()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: the model is too small to gain from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_task(folder: Path) -> TaskCheck:
    """Load the task file of a finished run onto a fresh base model, then merge it, and compare."""
    saved = SavedRun.find(folder)
    before = [row["predicted"] for row in RunFolder(folder).read_lines("predictions")]
    tuned = saved.load()
    after_loading = _predictions(tuned, saved)
    merged = merge(tuned)
    after_merging = _predictions(merged, saved)
    plain = build(saved.model, saved.num_classes).model
    return TaskCheck(
        path=str(saved.path),
        images=len(before),
        same_after_loading=_agreeing(before, after_loading),
        same_after_merging=_agreeing(before, after_merging),
        has_plain_layers=_layers(merged) == _layers(plain),
    )


def _run_all(
    jobs: Mapping[str, FinetuneJob], output: Path, processes: int, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Run every job into the folder of its name, several at a time."""
    progress.start(f"{len(jobs)} runs of tuning", len(jobs))
    results: dict[str, dict[str, Any]] = {}
    if processes == 1:
        for name, job in jobs.items():
            results[name] = _run_one(job, output / name)
            progress.advance(1, _told(name, results[name]))
        return results
    # a fresh interpreter each: a fork would inherit torch's threads in a state they cannot run in
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context) as pool:
        running = {pool.submit(_run_one, job, output / name): name for name, job in jobs.items()}
        try:
            for done in as_completed(running):
                name = running[done]
                results[name] = done.result()
                progress.advance(1, _told(name, results[name]))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def _run_one(job: FinetuneJob, folder: Path) -> dict[str, Any]:
    with one_thread():
        return finetune(job, folder, force=True, device="cpu")


def _told(name: str, result: Mapping[str, Any]) -> str:
    return f"{name}: {100 * result['test_accuracy']:.1f} %"


def _methods(model: ModelSource) -> list[Method]:
    rival = Method("lora", rank=8)
    plan = make_plan(build(model, len(NEW)).model, rival)
    assert plan is not None
    spt_lora = Method("spt-lora", budget=plan.num_trainable, rank=8)
    return [Method("linear"), rival, spt_lora, Method("full")]


def _base_accuracy(base: ModelSource, digits: Path) -> float:
    """Of the base model as it is shipped, on digits that it knows."""
    model = build(base, len(OLD)).model
    images = read_evaluation_images(digits, tuple(map(str, OLD)))
    form = preprocessing_of(model, **FORM)
    batches = Batches(PixelSet(images, form).preload(), RECIPE.batch_size, pick_device("cpu"))
    with one_thread():
        return evaluate(model, batches).top1


def _row(method: str, results: list[dict[str, Any]]) -> DemoRow:
    first = results[0]
    return DemoRow(
        method=method,
        trained_parameters=first["trained_parameters"],
        accuracies=tuple(result["test_accuracy"] for result in results),
        step_ms=statistics.median(result["step_ms"] for result in results),
        accounted_peak_bytes=first["accounted_peak_bytes"],
        task_bytes=max(result["task_bytes"] for result in results),
    )


def _predictions(model: nn.Module, saved: SavedRun) -> list[str]:
    assert saved.job is not None
    assert saved.form is not None
    images = read_evaluation_images(saved.job.images.root, saved.classes)
    size = saved.job.recipe.batch_size
    batches = Batches(PixelSet(images, saved.form).preload(), size, pick_device("cpu"))
    return [images.classes[chosen] for chosen in evaluate(model, batches).predictions]


def _agreeing(one: Sequence[str], other: Sequence[str]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=True))


def _layers(model: nn.Module) -> Mapping[str, type]:
    return {name: type(module) for name, module in model.named_modules()}
