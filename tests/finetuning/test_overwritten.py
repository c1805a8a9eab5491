"""What a run is made of survives that it overwrites the run that left it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from spt_kernels.finetuning import FinetuneJob, ImageSource, Method, ModelSource, Recipe, finetune
from spt_kernels.segmentation import SegmentationJob, SegmentationRecipe, segment

pytestmark = pytest.mark.usefixtures("quickly")

RECIPE = Recipe(epochs=1, batch_size=8)


def test_base_weights_of_the_run_that_is_overwritten_are_refused(
    tmp_path: Path, task: ImageSource, base: ModelSource
) -> None:
    first = tmp_path / "first"
    finetune(FinetuneJob(base, task, Method("full"), RECIPE), first)
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    (tmp_path / "link").symlink_to(first)
    own = replace(base, weights=str(tmp_path / "link" / "model.safetensors"))
    job = FinetuneJob(own, task, Method("bias"), RECIPE)
    with pytest.raises(ValueError, match=r"weights: .* is of the run that is to be overwritten"):
        finetune(job, first, force=True)
    scenes = SegmentationJob(own, "nowhere", Method("linear"), SegmentationRecipe(iterations=2))
    with pytest.raises(ValueError, match=r"weights: .* is of the run that is to be overwritten"):
        segment(scenes, first, force=True)
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    assert finetune(job, tmp_path / "second")["epochs"] == 1


def test_a_given_sensitivity_of_the_run_that_is_overwritten_stays(
    tmp_path: Path, task: ImageSource, base: ModelSource
) -> None:
    folder = tmp_path / "run"
    job = FinetuneJob(base, task, Method("spt-unstructured", 600, samples=5), RECIPE)
    finetune(job, folder)
    measured = folder / "sensitivity.safetensors"
    content = measured.read_bytes()
    shutil.copy(measured, tmp_path / "copy")
    given = replace(job, method=Method("spt-unstructured", 300), sensitivity=str(measured))
    finetune(given, folder, force=True)
    assert measured.read_bytes() == content
    finetune(replace(given, sensitivity=str(tmp_path / "copy")), folder, force=True)
    assert not measured.exists()
