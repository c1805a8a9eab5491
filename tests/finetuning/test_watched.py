"""A run that is listened to, written for TensorBoard, and ended early."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from spt_kernels.finetuning import (
    FinetuneJob,
    ImageSource,
    Method,
    ModelSource,
    Recipe,
    SavedRun,
    finetune,
)

pytestmark = pytest.mark.usefixtures("quickly")

# steps too small to change anything: after the first epoch none is better
STILL = Recipe(epochs=20, batch_size=8, lr=1e-30, weight_decay=0.0, drop_path=0.0, patience=2)


def job_of(task: ImageSource, base: ModelSource, recipe: Recipe) -> FinetuneJob:
    return FinetuneJob(base, task, Method("linear"), recipe)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_ends_when_epochs_are_no_better(
    tmp_path: Path, task: ImageSource, base: ModelSource
) -> None:
    folder = tmp_path / "run"
    job = job_of(task, base, STILL)
    result = finetune(job, folder)
    assert (result["epochs"], result["best_epoch"], result["stopped_early"]) == (3, 1, True)
    assert result["best_file"] == "best-task.safetensors"
    assert SavedRun.find(folder / result["best_file"]).load() is not None
    assert "none of 2 epochs was better than epoch 1" in (folder / "log.txt").read_text()
    assert finetune(job, folder, resume=True) == result


def test_patience_counts_from_the_best_and_not_between_looks(
    tmp_path: Path, task: ImageSource, base: ModelSource
) -> None:
    looks = replace(STILL, val_every=2, patience=3)
    result = finetune(job_of(task, base, looks), tmp_path / "looks")
    # looked at after 2, which is the best, 4 and 6
    assert (result["epochs"], result["best_epoch"]) == (6, 2)
    learning = replace(STILL, epochs=3, lr=1e-3)
    result = finetune(job_of(task, base, learning), tmp_path / "learning")
    assert (result["epochs"], result["stopped_early"]) == (3, False)


def test_a_patience_that_is_spent_with_the_last_epoch_leaves_a_whole_run(
    tmp_path: Path, task: ImageSource, base: ModelSource
) -> None:
    job, folder = job_of(task, base, replace(STILL, epochs=3)), tmp_path / "run"
    result = finetune(job, folder)
    assert (result["epochs"], result["best_epoch"], result["stopped_early"]) == (3, 1, False)
    assert "stopped" not in (folder / "log.txt").read_text()
    heard: list[Any] = []
    longer = replace(job, recipe=replace(job.recipe, epochs=20))
    again = finetune(longer, folder, resume=True, on_epoch=heard.append)
    assert (again["epochs"], again["stopped_early"], heard) == (3, True, [])
    assert (again["test_accuracy"], again["best_file"]) == (
        result["test_accuracy"],
        result["best_file"],
    )


def test_a_run_that_was_killed_at_its_early_end_is_over(
    tmp_path: Path, task: ImageSource, base: ModelSource
) -> None:
    def stop(figures: Any) -> None:
        if figures.epoch == 3:
            raise KeyboardInterrupt

    job, folder = job_of(task, base, STILL), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        finetune(job, folder, on_epoch=stop)
    heard: list[Any] = []
    result = finetune(job, folder, resume=True, on_epoch=heard.append)
    assert (result["epochs"], result["stopped_early"], heard) == (3, True, [])


def test_who_listens_hears_each_epoch_once(
    tmp_path: Path, task: ImageSource, base: ModelSource
) -> None:
    heard: list[dict[str, Any]] = []

    def listen(figures: Any) -> None:
        heard.append(asdict(figures))
        if figures.epoch == 2 and len(heard) == 2:
            raise OSError("the tracker is away")

    job = job_of(task, base, Recipe(epochs=3, batch_size=8))
    with pytest.raises(OSError, match="away"):
        finetune(job, tmp_path / "run", checkpoint_seconds=0, on_epoch=listen)
    finetune(job, tmp_path / "run", resume=True, on_epoch=listen)
    assert heard == rows_in(tmp_path / "run")


def test_what_tensorboard_reads_is_what_was_written_down(
    tmp_path: Path, task: ImageSource, base: ModelSource
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    job = job_of(task, base, Recipe(epochs=2, batch_size=8))
    finetune(job, folder, tensorboard=True)
    longer = replace(job, recipe=replace(job.recipe, epochs=3))
    result = finetune(longer, folder, resume=True, tensorboard=True)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    rows = rows_in(folder)
    for name, key in (
        ("loss/train", "train_loss"),
        ("accuracy/validation", "val_accuracy"),
        ("learning rate", "lr"),
    ):
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [s.value for s in scalars] == pytest.approx([row[key] for row in rows])
    [test] = events.Scalars("accuracy/test")
    assert test.value == pytest.approx(result["test_accuracy"])
    finetune(job, folder, force=True)
    assert not (folder / "tensorboard").exists()  # another run's


class Writer:
    """Stands for the one of TensorBoard, and knows whether it was closed."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, folder: str) -> None:
        self.is_closed = False
        self.made.append(self)

    def add_scalar(self, name: str, value: float, at: int) -> None:
        assert not self.is_closed

    def add_text(self, name: str, text: str) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("is_stopped", [False, True])
def test_files_of_tensorboard_are_closed_however_a_run_ends(
    is_stopped: bool,
    tmp_path: Path,
    task: ImageSource,
    base: ModelSource,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Writer, "made", [])
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    module = ModuleType("torch.utils.tensorboard")
    monkeypatch.setattr(module, "SummaryWriter", Writer, raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)

    def stop(figures: Any) -> None:
        if is_stopped and figures.epoch == 2:
            raise KeyboardInterrupt

    job = job_of(task, base, Recipe(epochs=3, batch_size=8))
    with pytest.raises(KeyboardInterrupt) if is_stopped else contextlib.nullcontext():
        finetune(job, tmp_path / "run", tensorboard=True, on_epoch=stop)
    [writer] = Writer.made
    assert writer.is_closed


def test_what_cannot_be_watched_is_refused(
    tmp_path: Path, task: ImageSource, base: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = replace(task, val_share=0.0)
    with pytest.raises(ValueError, match="patience: there are no validation images"):
        finetune(job_of(without, base, STILL), tmp_path / "run")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'spt_kernels\[tensorboard\]'"):
        finetune(job_of(task, base, STILL), tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"patience: expected at least val_every \(4\) epochs"):
        Recipe(val_every=4, patience=3)
    with pytest.raises(ValueError, match="patience"):
        Recipe(patience=0)
