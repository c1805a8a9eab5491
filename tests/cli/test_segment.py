"""`spt-kernels segment`, and `evaluate` of what it leaves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from spt_kernels.segmentation import pictures
from tests.cli.test_commands import complaint_of, json_of, output_of
from tests.segmentation.scenes_on_disk import TINY, write_backbone, write_scenes


def test_from_scenes_to_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_scenes(tmp_path / "scenes", training=4, validation=2)
    write_backbone(tmp_path / "vit.safetensors")
    shape = [part for key, value in TINY.items() for part in ("--model-arg", f"{key}={value}")]
    model = ["-m", "vit_tiny_patch16_224", *shape, "-w", "vit.safetensors"]
    small = ["--crop", "32", "--channels", "8", "--iterations", "2", "--batch-size", "2"]
    start = ["segment", *model, "-d", "scenes", *small, "-b", "1500", "--rank", "2", "-q"]
    result = json_of([*start, "-o", "run"], capsys)
    assert result["trained_parameters"] <= 1500
    assert result["accounted_peak_bytes"] > 4 * result["backbone_parameters"]
    assert "task.safetensors" in result["written"]
    again = ["evaluate", "run", "-q", "--save-predictions", "labels", "--multi-scale"]
    seen = json_of(again, capsys)
    assert seen["miou"] == result["miou"]
    assert seen["miou_multi_scale"] is not None
    assert len(list((tmp_path / "labels").iterdir())) == 4
    shown = output_of(["inspect", "run"], capsys)
    assert "mIoU" in shown
    assert "ground, disc, bar" in shown
    file = output_of(["inspect", "run/task.safetensors"], capsys)
    assert "32 × 32, windows of scenes, bilinear" in " ".join(file.split())
    text = output_of(["segment", "--resume", "-o", "run", "-q"], capsys)
    assert "mIoU" in text
    assert "peak memory, accounted" in text
    assert "disc" in output_of(["evaluate", "run/task.safetensors", "-d", "scenes"], capsys)
    photos = [str(tmp_path / "scenes" / "images" / split) for split in ("training", "validation")]
    seen = json_of(["predict", "run", *photos, "--save-predictions", "new", "-q"], capsys)
    assert len(seen["images"]) == 6
    assert all(sum(own["shares"].values()) == pytest.approx(1) for own in seen["images"])
    assert len(list((tmp_path / "new").iterdir())) == 12
    asked: Counter[str] = Counter()
    identity = pictures._identity
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "_identity", lambda p: asked.update([str(p)]) or identity(p))
        json_of(["evaluate", "run", "--save-predictions", "once", "-q"], capsys)
        json_of(["predict", "run", photos[0], "--save-predictions", "once-more", "-q"], capsys)
    assert len(asked) == 12
    assert set(asked.values()) == {1}, "names are looked at once"
    assert json_of(["merge", "run", "-o", "merged.safetensors"], capsys)["num_classes"] == 3
    merged = json_of(["evaluate", "merged.safetensors", "-d", "scenes", "-q"], capsys)
    assert merged["pixel_accuracy"] == pytest.approx(result["pixel_accuracy"], abs=0.01)

    for arguments, words in (
        ([*start, "-o", "run"], "--output: run is not empty (--resume goes on with the run in it"),
        (["evaluate", "run", "--confusion", "a.png"], "--confusion: the model labels pixels"),
        (["predict", "run", "scenes"], "--save-predictions: name the folder"),
        (["predict", "run", "scenes", "--top", "2"], "--top: the model labels pixels"),
        (
            ["predict", "run", *photos, "--save-predictions", "scenes/annotations/training"],
            "--save-predictions: scenes/annotations/training is not empty",
        ),
        (
            ["evaluate", "run", "--save-predictions", "scenes/annotations/validation", "--force"],
            "annotations/validation/ADE_valid_00000001.png is read, and a predicted label map",
        ),
        (
            ["predict", "run", "new", "--save-predictions", "new", "--force"],
            "would both be written as ADE_train_00000001-overlay.png",
        ),
        (
            [
                "predict",
                "run",
                "new/ADE_train_00000001.png",
                "--save-predictions",
                "new",
                "--force",
            ],
            "--save-predictions: new/ADE_train_00000001.png is read",
        ),
        (
            [*start, "-o", "x", "--save-predictions", "scenes/annotations/validation", "--force"],
            "annotations/validation/ADE_valid_00000001.png is read, and a predicted label map",
        ),
        (["evaluate", "run", "-m", "vit_tiny_patch16_224"], "--model: the file of a model that"),
        (
            ["finetune", "--resume", "-o", "run"],
            "--output: run holds a run of segment, not of finetune; spt-kernels segment --resume",
        ),
        (["compare", "run"], "none is finished: run (it labels pixels)"),
        (["plot", "budget", "run"], "FILES: run holds a run that labels pixels, not images"),
        (
            ["segment", *model, "-d", "scenes", "-o", "x", "--method", "mlp-2"],
            "--method: 'mlp-2' is for classification alone; expected one of full, linear, bias,",
        ),
        (["segment", "--resume", "-o", "none"], "--resume: no run in none; give the model"),
        ([*start, "-o", "x", "--method", "noa"], "published-layer (K is a number), got 'noa'"),
        ([*start, "-o", "x", "--crop", "0"], "--crop: expected more than zero, got 0"),
        ([*start, "-o", "x", "--plan", "run/plan.safetensors", "-b", "9"], "--budget: the plan"),
        ([*start, "-o", "x", "--plan", "none"], "--plan: no such file: none"),
        ([*start, "-o", "x", "--stride", "33"], "--stride: expected 1 to the 32 pixels"),
        ([*start, "-o", "x", "--mean", "a"], "--mean: expected one number per channel"),
        ([*start, "-o", "x", "--val-every", "9"], "--val-every: nothing is held out to look at"),
    ):
        assert words in complaint_of(arguments, capsys), arguments
