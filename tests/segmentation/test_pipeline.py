"""A run from scenes to a task file: killed and resumed, saved and loaded, refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spt_kernels.cli import app
from spt_kernels.errors import BaseModelMismatch, DeltaFormatError
from spt_kernels.finetuning import Method, ModelSource, SavedRun
from spt_kernels.plan import allocate
from spt_kernels.segmentation import (
    SavedSegmentation,
    SegmentationJob,
    SegmentationRecipe,
    build_setr,
    evaluate_scenes,
    evaluation,
    pipeline,
    prediction,
    read_ade20k,
    segment,
)
from spt_kernels.segmentation.pictures import palette
from spt_kernels.segmentation.saved import is_segmentation
from spt_kernels.segmentation.scenes import read_labels
from spt_kernels.segmentation.slide import in_precision
from spt_kernels.sensitivity import skewed_sensitivity
from tests.finetuning.killed import Killed

from .short_runs import SHORT, Dying

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("quickly")


@pytest.mark.parametrize("name", ["spt-lora", "lora-2"])
def test_wherever_a_run_is_killed_the_same_file_comes_out(
    name: str, job: SegmentationJob, tmp_path: Path
) -> None:
    if name != "spt-lora":
        job = replace(job, method=Method(name))
    whole = segment(job, tmp_path / "whole", report_every=2)
    folder = tmp_path / "killed"
    options: dict[str, Any] = {"report_every": 2, "checkpoint_seconds": 0, "resume": True}
    for stage, steps in (
        *([("measuring sensitivity", 3)] if name == "spt-lora" else []),
        *(("training", 1), ("training", 5), ("training", 7), ("testing", 2)),
    ):
        with pytest.raises(Killed):
            segment(job, folder, progress=Dying(stage, steps), **options)
    resumed = segment(job, folder, **options)
    files = ["plan.safetensors", "sensitivity.safetensors"] if name == "spt-lora" else []
    for file in (whole["file"], *files):
        assert (folder / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    own = ("miou", "pixel_accuracy", "train_loss", "classes")
    assert [resumed[key] for key in own] == [whole[key] for key in own]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [row["iteration"] for row in rows] == [2, 4, 6, 7]
    assert segment(job, folder, resume=True) == resumed, "it is finished"


@pytest.mark.parametrize(
    "name", ["spt-lora", "spt-adapter", "spt-prompt", "prompt-shallow", "linear", "full"]
)
def test_what_is_saved_labels_scenes_as_what_was_trained(
    name: str, job: SegmentationJob, tmp_path: Path
) -> None:
    if name != "spt-lora":
        options = {"spt-adapter": {"rank": 2}, "linear": {}, "full": {}}.get(name, {})
        if name.startswith("spt"):
            options |= {"samples": 5}
        if name not in ("linear", "full"):
            options |= {"budget": 1500}
        method = Method(name, **options)
        job = replace(job, method=method)
    job = replace(job, recipe=replace(SHORT, iterations=3, lr=1e-2))
    folder = tmp_path / "run"
    result = segment(job, folder, save_predictions=tmp_path / "labels")
    saved = SavedSegmentation.find(folder)
    assert saved.told.classes == ("ground", "disc", "bar")
    assert saved.data == job.data
    model, scenes = saved.load(), read_ade20k(job.data, "validation")
    scores = evaluate_scenes(model, scenes, saved.told.form, CPU, save_to=tmp_path / "again")
    assert scores.to_json() == {key: result[key] for key in scores.to_json()}
    for path in (tmp_path / "labels").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    norm = model.decode_head.steps[0][1]
    assert int(norm.num_batches_tracked) == 3, "running statistics are the decoder's, too"
    assert result["head_parameters"] == sum(
        p.numel() for n, p in model.named_parameters() if n.startswith(model.trained_whole)
    )
    if name.startswith("spt"):
        assert result["trained_parameters"] <= 1500


def test_a_sensitivity_or_a_plan_that_is_given_is_not_measured_again(
    job: SegmentationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = segment(job, tmp_path / "measured")
    monkeypatch.setattr(pipeline, "measure_on", None)
    for part in ("sensitivity", "plan"):
        file, folder = tmp_path / "measured" / f"{part}.safetensors", tmp_path / part
        given: dict[str, Any] = {"method": None, part: str(file)}
        if part == "sensitivity":
            given["method"] = replace(job.method, samples=800)  # by default; the file has 5
        own = replace(job, **given)
        result = segment(own, folder)
        assert result["trained_parameters"] == measured["trained_parameters"]
        for name in ("plan", "task"):
            was = (tmp_path / "measured" / f"{name}.safetensors").read_bytes()
            assert (folder / f"{name}.safetensors").read_bytes() == was
        file.rename(tmp_path / f"{part}.moved")
        assert segment(own, folder, resume=True) == result


def test_a_plan_or_a_sensitivity_that_does_not_fit_is_refused(
    job: SegmentationJob, tmp_path: Path
) -> None:
    model = build_setr(job.model, 3, job.size, channels=job.channels).model
    scores = skewed_sensitivity(model, head=("decode_head",))  # the auxiliary heads are none
    scores.save(tmp_path / "a.sensitivity")
    allocate(scores, 1500, rank=2).save(tmp_path / "a.plan")
    for given, complaint in (
        ({"plan": "a.plan"}, "^plan: expected one whose head is the decoder, decode_head"),
        ({"sensitivity": "a.sensitivity"}, "^sensitivity: expected one whose head is the decoder"),
    ):
        files = {name: str(tmp_path / file) for name, file in given.items()}
        with pytest.raises(ValueError, match=complaint):
            segment(replace(job, method=None, **files), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    for given, complaint in (
        ({"plan": "p", "method": Method("full")}, "^plan: method 'full' does not use one"),
        ({"sensitivity": "s", "method": Method("bias")}, "^sensitivity: method 'bias' does not"),
        ({"sensitivity": "s", "plan": "p"}, "^sensitivity: the plan was made of one already"),
    ):
        with pytest.raises(ValueError, match=complaint):
            replace(job, **given)


def test_it_learns_what_is_where(job: SegmentationJob, tmp_path: Path) -> None:
    recipe = SegmentationRecipe(iterations=60, batch_size=3, lr=1e-2)
    result = segment(replace(job, recipe=recipe, channels=32), tmp_path / "run")
    assert result["miou"] > 0.5  # about 0.8; the ground everywhere has 0.25
    assert all(own["iou"] > 0.2 for own in result["classes"].values())


def test_a_task_file_alone_needs_its_backbone_and_nothing_else(
    job: SegmentationJob, tmp_path: Path
) -> None:
    segment(job, tmp_path / "run")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((tmp_path / "run" / "task.safetensors").read_bytes())
    saved = SavedSegmentation.find(alone)
    assert saved.data is None
    images = torch.randn(1, 3, 32, 32)
    tuned, merged = saved.load(), saved.merged()
    assert not hasattr(merged, "spt_tuning")
    with torch.no_grad():
        torch.testing.assert_close(merged(images), tuned(images), atol=1e-5, rtol=1e-4)
    gone = tmp_path / "gone.safetensors"
    with pytest.raises(ValueError, match=r"tuned from .*gone.* is not there"):
        SavedSegmentation.find(alone, weights=gone).load()
    other = SavedSegmentation.find(alone)
    with pytest.raises(BaseModelMismatch):
        other.on(replace(other.told.model, weights=None)).load()
    data = bytearray(alone.read_bytes())
    data[-3] ^= 1
    alone.write_bytes(data)
    with pytest.raises(DeltaFormatError):
        SavedSegmentation.find(alone)


def test_a_model_is_looked_at_in_the_precision_that_it_was_tested_in(
    job: SegmentationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = str(tmp_path / "run"), []
    recipe = replace(SHORT, iterations=1, amp="bf16")
    segment(replace(job, method=Method("linear"), recipe=recipe), run)

    def noted(model: Any, device: torch.device, amp: str) -> Any:
        asked.append(amp)
        return in_precision(model, device, amp)

    for module in (evaluation, prediction):
        monkeypatch.setattr(module, "in_precision", noted)
    image = str(next(Path(job.data, "images", "validation").iterdir()))
    labelled = ["predict", run, image, "--force", "--save-predictions", str(tmp_path / "labels")]
    for arguments in (["evaluate", run], labelled):
        for more in ([], ["--amp", "none"]):
            assert app.run([*arguments, *more, "-q"]) == 0
    assert asked == ["bf16", "none"] * 2


def test_commands_that_are_for_images_say_so(job: SegmentationJob, tmp_path: Path) -> None:
    segment(replace(job, method=Method("linear")), tmp_path / "run")
    assert is_segmentation(tmp_path / "run")
    assert is_segmentation(tmp_path / "run" / "task.safetensors")
    assert not is_segmentation(tmp_path)
    assert not is_segmentation(tmp_path / "none")
    with pytest.raises(ValueError, match="labels pixels, not images"):
        SavedRun.find(tmp_path / "run")


def test_more_than_a_finished_run_had(job: SegmentationJob, tmp_path: Path) -> None:
    job = replace(job, method=Method("linear"), recipe=replace(SHORT, warmup_iterations=1))
    short, labels = replace(job, recipe=replace(job.recipe, iterations=2)), tmp_path / "labels"
    segment(short, tmp_path / "run")
    for how, words in (
        (
            {"multi_scale": True},
            r"^multi_scale: .* `spt-kernels evaluate .*run --multi-scale` tests",
        ),
        ({"save_predictions": labels}, r"^save_predictions: .*run --save-predictions .*labels`"),
    ):
        with pytest.raises(ValueError, match=words):
            segment(short, tmp_path / "run", resume=True, **how)
    assert segment(job, tmp_path / "run", resume=True)["iterations"] == 7
    with pytest.raises(ValueError, match=r"holds another job \(recipe: seed was 0, is 1\)"):
        segment(replace(job, recipe=replace(job.recipe, seed=1)), tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="is not empty"):
        segment(job, tmp_path / "run")


def test_predicted_labels_are_read_as_the_true_ones_are(
    job: SegmentationJob, tmp_path: Path
) -> None:
    """A palette and an overlay are for people; the values are ADE20K's."""
    how: dict[str, Any] = {"save_predictions": tmp_path / "labels", "multi_scale": True}
    result = segment(job, tmp_path / "run", **how)
    assert segment(job, tmp_path / "run", resume=True, **how) == result, "the same command again"
    assert 0 <= result["miou_multi_scale"] <= 1
    scenes, right, all_ = read_ade20k(job.data, "validation"), 0, 0
    for path, annotation in zip(scenes.paths, scenes.annotations, strict=True):
        predicted = read_labels(tmp_path / "labels" / f"{path.stem}.png", 3)
        truth = read_labels(annotation, 3)
        known = truth != 255
        right, all_ = right + int((predicted == truth)[known].sum()), all_ + int(known.sum())
        with Image.open(tmp_path / "labels" / f"{path.stem}-overlay.png") as overlay:
            mixed = np.asarray(overlay).astype(int)
        with Image.open(path) as image:
            colours = np.array(palette(3))[predicted]
            expected = (np.asarray(image).astype(int) + colours) / 2
        assert np.abs(mixed - expected).max() <= 0.5
    assert right / all_ == result["pixel_accuracy_multi_scale"]
    assert len(set(palette(150))) == 150


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"method": Method("peft-shira")}, "^method: 'peft-shira' is for classification alone"),
        ({"method": Method("linear", head="decode_head")}, "^head: it is the decoder"),
        ({"size": 0}, "^size: expected more than zero"),
        ({"model": ModelSource("vit_tiny_patch16_224")}, "^weights: method 'spt-lora' needs"),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, Any], complaint: str, job: SegmentationJob
) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(job, **changes)


def test_what_is_counted_is_a_whole_number(job: SegmentationJob) -> None:
    for whole, names in (
        (SHORT, ("iterations", "batch_size", "warmup_iterations", "val_every", "patience", "seed")),
        (job, ("size", "stride", "channels")),
    ):
        for name in names:
            with pytest.raises(TypeError, match=f"^{name}: expected a whole number, got 4.0"):
                replace(whole, **{name: 4.0})


def test_a_start_that_fails_leaves_nothing(job: SegmentationJob, tmp_path: Path) -> None:
    for bad, complaint in (
        (replace(job, data=str(tmp_path / "none")), "^data: no such folder"),
        (replace(job, stride=40), "^stride: expected 1 to the 32"),
        (replace(job, size=7), "^size: expected at least the 8 × 8 pixels of a patch, got 7"),
        (replace(job, method=Method("spt-lora-structured", 10)), "^budget: the smallest LoRA"),
    ):
        with pytest.raises(ValueError, match=complaint):
            segment(bad, tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["spt-lora", "linear"])
def test_scenes_without_a_label_are_refused(
    name: str, job: SegmentationJob, tmp_path: Path
) -> None:
    bare = shutil.copytree(job.data, tmp_path / "scenes")
    for path in (bare / "annotations" / "training").iterdir():
        Image.new("L", (48, 40), 0).save(path)
    method = job.method if name == "spt-lora" else Method(name)
    own, folder = replace(job, data=str(bare), method=method), tmp_path / "run"
    with pytest.raises(
        ValueError, match=r"^data: no training image that was looked at has a label"
    ):
        segment(own, folder, report_every=2)  # all six scenes are seen after these
    assert not folder.exists()


def test_a_report_without_a_label_is_no_reason_to_end_a_run_that_had_some(
    job: SegmentationJob, tmp_path: Path
) -> None:
    scarce = shutil.copytree(job.data, tmp_path / "scenes")
    unlabelled = sorted((scarce / "annotations" / "training").iterdir())[1:]
    for path in unlabelled:
        Image.new("L", (48, 40), 0).save(path)
    recipe = SegmentationRecipe(iterations=18, batch_size=1)
    own = replace(job, data=str(scarce), method=Method("linear"), recipe=recipe)
    segment(own, tmp_path / "run", report_every=1)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert sum(row["train_loss"] > 0 for row in rows) == 3, "one scene of six, three times"


def test_the_learning_rate_falls_by_a_polynomial() -> None:
    recipe = SegmentationRecipe(iterations=1000, warmup_iterations=100, min_lr_share=0.1)
    assert recipe.lr_factor(0) == pytest.approx(1 / 101)
    assert recipe.lr_factor(100) == 1
    assert recipe.lr_factor(550) == pytest.approx(0.1 + 0.9 * 0.5**0.9)
    assert recipe.lr_factor(1000) == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"^warmup_iterations: expected fewer than iterations"):
        SegmentationRecipe(iterations=5, warmup_iterations=5)
    for method, lr in (("spt-lora", 1e-3), ("full", 1e-4), ("partial-1", 1e-4)):
        assert recipe.peak_lr(Method(method)) == lr
        assert replace(recipe, lr=0.5).peak_lr(Method(method)) == 0.5
