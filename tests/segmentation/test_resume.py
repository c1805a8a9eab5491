"""A run goes on with the scenes that it began with, from a state that can be read."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from spt_kernels.finetuning import Method
from spt_kernels.segmentation import SegmentationJob, segment

from .scenes_on_disk import write_scenes

pytestmark = pytest.mark.usefixtures("quickly")


def test_other_scenes_and_a_damaged_state_are_refused_and_the_run_stays(
    job: SegmentationJob, tmp_path: Path
) -> None:
    data, folder = write_scenes(tmp_path / "scenes"), tmp_path / "run"
    job = replace(job, data=str(data), method=Method("linear"), val_share=0.3)
    job = replace(job, recipe=replace(job.recipe, iterations=2))
    segment(job, folder)
    longer = replace(job, recipe=replace(job.recipe, iterations=3))

    def refused(words: str) -> None:
        before = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "log.txt"}
        with pytest.raises(ValueError, match=words):
            segment(longer, folder, resume=True)
        after = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "log.txt"}
        assert after == before

    shutil.copy(folder / "state.pt", tmp_path / "state.pt")
    (folder / "state.pt").write_bytes(b"garbage")
    refused(r"run/state\.pt: the checkpoint is damaged")
    shutil.copy(tmp_path / "state.pt", folder / "state.pt")
    for kind, ending in (("images", "jpg"), ("annotations", "png")):
        first = data / kind / "training" / f"ADE_train_00000001.{ending}"
        first.rename(first.with_stem("ADE_train_00000099"))
    refused("data: the run began with 4 training and 2 validation images, now there are 4 ")
    for kind, ending in (("images", "jpg"), ("annotations", "png")):
        last = data / kind / "training" / f"ADE_train_00000099.{ending}"
        last.rename(last.with_stem("ADE_train_00000001"))
    names = data / "objectInfo150.txt"
    text = names.read_text()
    names.write_text(text.replace("disc", "ring"))
    refused("data: the run began with the classes ground, disc, bar, now there are ground, ring")
    names.write_text(text)
    assert segment(longer, folder, resume=True)["iterations"] == 3
