"""Scenes that cannot be read are named before the work; workers change nothing of what is read."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from spt_kernels.finetuning.images import readable
from spt_kernels.finetuning.progress import Silent
from spt_kernels.methods import Method
from spt_kernels.segmentation import SegmentationJob, read_ade20k, segment
from spt_kernels.segmentation.ade20k import hold_out
from spt_kernels.segmentation.reading import check_scenes, images_of, scenes_of
from spt_kernels.segmentation.scenes import glance_at_scene, read_image, read_scene
from tests.finetuning.test_readable import Stages

pytestmark = pytest.mark.usefixtures("quickly")


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("images/training/ADE_train_00000003.jpg", "the image"),
        ("annotations/training/ADE_train_00000003.png", "the label map"),
        ("images/validation/ADE_valid_00000003.jpg", "the image"),
        ("annotations/validation/ADE_valid_00000003.png", "the label map"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_ends_a_run_before_it_begins(
    file: str, what: str, workers: int, job: SegmentationJob, tmp_path: Path
) -> None:
    """One of a validation image was found after the last iteration."""
    root = shutil.copytree(job.data, tmp_path / "scenes")
    bad = root / file
    bad.write_bytes(bad.read_bytes()[:60])
    own, stages = replace(job, data=str(root), val_share=0.2), Stages()
    with pytest.raises(ValueError, match=rf"^{bad}: cannot read {what} \([^\n]*\)$"):
        segment(own, tmp_path / "run", workers=workers, progress=stages)
    assert set(stages.begun) == {"checking scenes"}
    assert not (tmp_path / "run").exists()


def test_a_label_that_there_is_not_ends_a_run_before_it_begins(
    job: SegmentationJob, tmp_path: Path
) -> None:
    root = shutil.copytree(job.data, tmp_path / "scenes")
    bad = root / "annotations" / "validation" / "ADE_valid_00000002.png"
    Image.new("L", (48, 40), 9).save(bad)
    own = replace(job, data=str(root), method=Method("linear"))
    with pytest.raises(ValueError, match=rf"^{bad}: expected labels of 0 to 3, got 9"):
        segment(own, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_of_very_many_scenes_the_beginning_is_looked_at(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = read_ade20k(shutil.copytree(data, tmp_path / "scenes"), "validation")
    bad = scenes.annotations[1]
    monkeypatch.setattr(readable, "MANY", 2)
    Image.new("L", (48, 40), 9).save(bad)  # which shows when it is read
    check_scenes(scenes, 0, Silent())
    for size, message in (((40, 48), "expected the 48 × 40 of its image, got 40 × 48"), (None, "")):
        if size is None:
            bad.write_bytes(b"")
        else:
            Image.new("L", size).save(bad)
        with pytest.raises(ValueError, match=message or "cannot read the label map"):
            check_scenes(scenes, 0, Silent())


def test_workers_read_the_same_and_draw_nothing(data: Path) -> None:
    scenes = read_ade20k(data, "training")
    before = torch.get_rng_state()
    for workers in (0, 1):
        check_scenes(scenes, workers, Silent())
        pictures = list(images_of(scenes.paths, workers))
        for picture, path, (image, labels), truth in zip(
            pictures, scenes.paths, scenes_of(scenes, workers), scenes.annotations, strict=True
        ):
            with Image.open(path) as file:
                assert np.array_equal(np.asarray(file), np.asarray(image))
                assert np.array_equal(np.asarray(file), np.asarray(picture))
            with Image.open(truth) as file:
                assert np.array_equal(np.asarray(file), np.where(labels == 255, 0, labels + 1))
    assert torch.equal(before, torch.get_rng_state())


def unlabelled(maps: Path) -> None:
    for path in maps.iterdir():
        Image.new("L", (48, 40), 0).save(path)


def test_held_out_scenes_without_a_label_end_a_run_before_it_begins(
    job: SegmentationJob, tmp_path: Path
) -> None:
    """It was found at the first look, after thousands of iterations."""
    root = shutil.copytree(job.data, tmp_path / "scenes")
    own = replace(job, data=str(root), method=Method("linear"), val_share=0.3)
    _, held_out = hold_out(read_ade20k(root, "training"), 0.3, job.recipe.seed)
    assert held_out is not None
    for path in held_out.annotations:
        Image.new("L", (48, 40), 255).save(path)
    stages = Stages()
    with pytest.raises(ValueError, match="val_share: no pixel of the 2 images that are held out"):
        segment(own, tmp_path / "run", progress=stages)
    assert set(stages.begun) == {"checking scenes"}
    assert not (tmp_path / "run").exists()


def test_a_test_without_a_label_is_said_before_the_training(
    job: SegmentationJob, tmp_path: Path
) -> None:
    root = shutil.copytree(job.data, tmp_path / "scenes")
    unlabelled(root / "annotations" / "validation")
    own = replace(job, data=str(root), method=Method("linear"))
    result = segment(own, tmp_path / "run")
    assert result["miou"] is None
    said = (tmp_path / "run" / "log.txt").read_text().splitlines()
    places = [
        next(i for i, line in enumerate(said) if words in line)
        for words in ("no pixel of the validation images has a label", "linear trains")
    ]
    assert places == sorted(places)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("side", [6, 4], ids=["wide", "square"])
def test_a_photograph_and_its_label_map_are_turned_upright(
    tmp_path: Path, orientation: int, side: int
) -> None:
    values = np.arange(4 * side, dtype=np.uint8).reshape(4, side)
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph, lying, upright = (tmp_path / f"{name}.png" for name in ("x", "lying", "upright"))
    Image.fromarray(values).save(photograph, exif=exif)
    Image.fromarray(values + 1).save(lying)
    with Image.open(photograph) as file:
        expected = np.asarray(ImageOps.exif_transpose(file))
    Image.fromarray(expected + 1).save(upright)
    assert np.array_equal(np.asarray(read_image(photograph))[..., 0], expected)
    # of one size with both a label map lies as its image does
    is_told = expected.shape != values.shape
    for annotation in (lying, upright) if is_told else (lying,):
        glance_at_scene(photograph, annotation)
        image, labels = read_scene(photograph, annotation, 200)
        assert np.array_equal(np.asarray(image)[..., 0], expected)
        assert np.array_equal(labels, expected)
    Image.new("L", (3, 3)).save(lying)
    for read in (glance_at_scene, lambda *paths: read_scene(*paths, 200)):
        rows, columns = expected.shape
        with pytest.raises(ValueError, match=f"expected the {columns} × {rows} of its image"):
            read(photograph, lying)
