"""A run that is listened to, written for TensorBoard, and ended early."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from spt_kernels.finetuning import Method, ModelSource
from spt_kernels.finetuning.training.best import BestSoFar
from spt_kernels.segmentation import (
    SavedSegmentation,
    SegmentationJob,
    SegmentationRecipe,
    evaluate_scenes,
    segment,
)
from spt_kernels.segmentation.ade20k import hold_out, read_ade20k
from spt_kernels.segmentation.setting import open_segmentation

# steps too small to change anything but the running statistics of the decoder's norms
STILL = SegmentationRecipe(
    iterations=20, batch_size=2, lr=1e-30, weight_decay=0.0, val_every=2, patience=4
)


pytestmark = pytest.mark.usefixtures("quickly")


@pytest.fixture(scope="module")
def job(data: Path, backbone: ModelSource) -> SegmentationJob:
    return SegmentationJob(
        backbone, str(data), Method("linear"), STILL, size=32, channels=8, val_share=0.3
    )


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_ends_when_iterations_are_no_better(job: SegmentationJob, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = segment(job, folder, report_every=3)
    rows = rows_in(folder)
    looks = {row["iteration"]: row["val_miou"] for row in rows if row["val_miou"] is not None}
    best = max(looks, key=lambda at: (looks[at], -at))
    assert (result["best_iteration"], result["best_val_miou"]) == (best, looks[best])
    assert result["iterations"] == min(20, best + 4)
    assert result["stopped_early"] == (result["iterations"] < 20)
    assert set(looks) == set(range(2, result["iterations"] + 1, 2))
    reports = {at for at in range(1, result["iterations"] + 1) if at % 3 == 0}
    assert {row["iteration"] for row in rows} == reports | set(looks)
    assert segment(job, folder, resume=True) == result


def test_a_patience_that_is_spent_with_the_last_iteration_leaves_a_whole_run(
    job: SegmentationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the first look is the best
    monkeypatch.setattr(BestSoFar, "look", _first_is_best(BestSoFar.look))
    job, folder = replace(job, recipe=replace(STILL, iterations=6)), tmp_path / "run"
    result = segment(job, folder)
    told = ("iterations", "best_iteration", "stopped_early")
    assert [result[name] for name in told] == [6, 2, False]
    assert "stopped" not in (folder / "log.txt").read_text()
    heard: list[Any] = []
    longer = replace(job, recipe=replace(job.recipe, iterations=20))
    again = segment(longer, folder, resume=True, on_report=heard.append)
    assert [again[name] for name in told] == [6, 2, True]
    assert (heard, again["miou"]) == ([], result["miou"])


def _first_is_best(look: Any) -> Any:
    return lambda self, done, rank, model: look(self, done, (-done,), model)


def test_the_best_is_kept_beside_the_last_also_when_killed(
    job: SegmentationJob, tmp_path: Path
) -> None:
    job = replace(job, recipe=replace(STILL, iterations=6, lr=0.05, patience=None))

    def stop(figures: Any) -> None:
        if figures.iteration == 4:
            raise KeyboardInterrupt

    whole = segment(job, tmp_path / "whole")
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        segment(job, folder, on_report=stop, checkpoint_seconds=0)
    result = segment(job, folder, resume=True)
    for key in ("best_iteration", "best_val_miou", "val_miou", "miou", "best_file"):
        assert result[key] == whole[key], key
    setting = open_segmentation(job, "cpu")
    assert setting.held_out is not None
    files = {"task.safetensors": result["val_miou"]}
    if result["best_file"] is not None:
        files[result["best_file"]] = result["best_val_miou"]
    for name, expected in files.items():
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        model = SavedSegmentation.find(folder / name).load()
        found = evaluate_scenes(model, setting.held_out, setting.form, setting.device)
        assert found.single.mean_iou == expected


def test_what_is_held_out_is_not_trained_on(job: SegmentationJob, tmp_path: Path) -> None:
    every = read_ade20k(job.data, "training")
    training, held_out = hold_out(every, 0.3, seed=0)
    assert held_out is not None
    assert set(training.paths) | set(held_out.paths) == set(every.paths)
    assert len(training) + len(held_out) == len(every)
    assert len(held_out) == round(0.3 * len(every))
    for path, annotation in zip(held_out.paths, held_out.annotations, strict=True):
        assert path.stem == annotation.stem
    setting = open_segmentation(job, "cpu")
    assert (setting.training, setting.held_out) == (training, held_out)
    assert hold_out(every, 0.0, seed=0) == (every, None)
    assert hold_out(every, 0.3, seed=1)[1] != held_out


def test_who_listens_hears_each_report_once_and_tensorboard_reads_them(
    job: SegmentationJob, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    heard: list[dict[str, Any]] = []

    def listen(figures: Any) -> None:
        heard.append(asdict(figures))
        if figures.iteration == 2 and len(heard) == 1:
            raise OSError("the tracker is away")

    job = replace(job, recipe=replace(STILL, iterations=5, patience=None))
    folder = tmp_path / "run"
    options: dict[str, Any] = {"report_every": 2, "tensorboard": True, "on_report": listen}
    with pytest.raises(OSError, match="away"):
        segment(job, folder, checkpoint_seconds=0, **options)
    result = segment(job, folder, resume=True, **options)
    rows = rows_in(folder)
    assert heard == rows
    assert [row["iteration"] for row in rows] == [2, 4, 5]
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for name, key in (("loss/train", "train_loss"), ("mIoU/validation", "val_miou")):
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [2, 4, 5]
        assert [s.value for s in scalars] == pytest.approx([row[key] for row in rows])
    [test] = events.Scalars("mIoU/test")
    assert (test.step, test.value) == (5, pytest.approx(result["miou"]))


def test_what_cannot_be_watched_is_refused(
    job: SegmentationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="patience: there are no validation images"):
        replace(job, val_share=0.0)
    with pytest.raises(ValueError, match="val_share: expected at least 0 and below 1, got 1"):
        replace(job, val_share=1.0)
    with pytest.raises(ValueError, match=r"val_share: 0\.99 of \d+ training images leaves none"):
        segment(replace(job, val_share=0.99), tmp_path / "run")
    with pytest.raises(ValueError, match=r"patience: expected at least val_every \(4\) iterations"):
        replace(STILL, val_every=4, patience=3)
    with pytest.raises(ValueError, match="val_every"):
        SegmentationRecipe(val_every=0)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'spt_kernels\[tensorboard\]'"):
        segment(job, tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
