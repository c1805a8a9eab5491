"""Runs that compute again to need less memory: to the same bytes, on the way, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spt_kernels.finetuning import Method
from spt_kernels.memory import estimate_memory
from spt_kernels.segmentation import SegmentationJob, pipeline, segment
from spt_kernels.segmentation.facts import accounted_bytes
from spt_kernels.segmentation.setting import open_segmentation
from tests.finetuning.killed import Killed

from .short_runs import SHORT, Dying

pytestmark = pytest.mark.usefixtures("quickly")


@pytest.mark.parametrize("name", ["spt-lora", "full"])
def test_what_is_computed_again_gives_the_same_file_and_may_change_on_the_way(
    name: str, job: SegmentationJob, tmp_path: Path
) -> None:
    if name != "spt-lora":
        job = replace(job, method=Method(name))
    folder = tmp_path / "run"
    options: dict[str, Any] = {"report_every": 2, "checkpoint_seconds": 0, "resume": True}
    whole = segment(job, tmp_path / "whole", report_every=2)
    for line, steps in (("mlp", 3), ("block@0,qkv@1", 5), (None, 7)):
        job = replace(job, recipe=replace(SHORT, recompute=line))
        with pytest.raises(Killed):
            segment(job, folder, progress=Dying("training", steps), **options)
    job = replace(job, recipe=replace(SHORT, recompute="block"))
    result = segment(job, folder, **options)
    assert (folder / result["file"]).read_bytes() == (
        tmp_path / "whole" / result["file"]
    ).read_bytes()
    assert result["miou"] == whole["miou"]
    assert (whole["recompute"], result["recompute"]) == (None, "block")


def test_a_run_that_met_the_end_of_the_memory_in_its_first_step_goes_on_in_less(
    job: SegmentationJob, tmp_path: Path
) -> None:
    job, folder = replace(job, method=Method("lora-2")), tmp_path / "run"
    with pytest.raises(torch.OutOfMemoryError):
        segment(job, folder, progress=Dying("training", 1, torch.OutOfMemoryError))
    assert {path.name for path in folder.iterdir()} == {"config.json", "log.txt"}
    less = replace(job, recipe=replace(SHORT, recompute="block"))
    assert segment(less, folder, resume=True)["recompute"] == "block"


def test_what_cannot_be_computed_again_is_refused_before_anything_is_measured(
    job: SegmentationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "measure_on", None)
    with pytest.raises(ValueError, match="recompute: expected mlp, qkv, attention, block"):
        replace(SHORT, recompute="mpl")
    own = replace(job, recipe=replace(SHORT, recompute="block@2"))
    with pytest.raises(ValueError, match=r"recompute: .*block@2"):
        segment(own, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["spt-lora", "lora-2"])
def test_what_only_a_rehearsal_tells_is_told_before_anything_is_measured(
    name: str, job: SegmentationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU an attention with dropout is not by the fused kernel that `qkv` keeps results of."""
    monkeypatch.setattr(pipeline, "accounted_bytes", accounted_bytes)
    monkeypatch.setattr(pipeline, "measure_on", None)
    model = replace(job.model, args={**job.model.args, "attn_drop_rate": 0.1})
    method = job.method if name == "spt-lora" else Method(name)
    own = replace(job, model=model, method=method, recipe=replace(SHORT, recompute="qkv"))
    with pytest.raises(ValueError, match=r"^recompute: .*attn: what=\"qkv\" keeps the result of"):
        segment(own, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_accounted_memory_has_the_loss_of_every_pixel(
    job: SegmentationJob,
) -> None:
    setting = open_segmentation(job, "cpu")
    model = setting.base.model
    whole = accounted_bytes(setting, model)
    cheap = estimate_memory(
        model, (3, 3, 32, 32), loss_fn=lambda heads, _: sum(h.mean() for h in heads), device="cpu"
    )
    one_log_probability_of_each_class = SHORT.batch_size * 3 * 32 * 32 * 4
    assert whole - cheap.peak_bytes > one_log_probability_of_each_class
