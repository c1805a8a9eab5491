"""ADE20K's layout: which files belong together, what a label means, and what is wrong with one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spt_kernels.segmentation import IGNORED, SegmentationJob, read_ade20k
from spt_kernels.segmentation.facts import notes_of
from spt_kernels.segmentation.scenes import read_labels, read_scene
from spt_kernels.segmentation.setting import open_segmentation

from .scenes_on_disk import CLASSES, write_scenes


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    shutil.copytree(data, tmp_path / "copy")
    return tmp_path / "copy"


def test_images_go_with_the_label_maps_of_their_names(data: Path) -> None:
    scenes = read_ade20k(data, "training")
    assert scenes.classes == CLASSES  # the first of the names in the list
    assert [path.name for path in scenes.paths] == [f"ADE_train_{i:08}.jpg" for i in range(1, 7)]
    assert [p.stem for p in scenes.annotations] == [p.stem for p in scenes.paths]
    assert len(read_ade20k(data, "validation")) == 3


def test_zero_is_no_class_and_one_is_the_first(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1, 150, 255]], dtype=np.uint8)).save(tmp_path / "a.png")
    assert read_labels(tmp_path / "a.png", 150).tolist() == [[IGNORED, 0, 149, IGNORED]]
    with pytest.raises(ValueError, match="expected labels of 0 to 149, got 150"):
        read_labels(tmp_path / "a.png", 149)


def test_a_palette_is_for_people(tmp_path: Path) -> None:
    picture = Image.fromarray(np.array([[2, 1]], dtype=np.uint8), "P")
    picture.putpalette([9, 9, 9] * 3)
    picture.save(tmp_path / "a.png")
    assert read_labels(tmp_path / "a.png", 3).tolist() == [[1, 0]]


def test_without_a_list_there_are_the_classes_of_the_challenge(copy: Path) -> None:
    (copy / "objectInfo150.txt").unlink()
    classes = read_ade20k(copy, "training").classes
    assert (len(classes), classes[0], classes[-1]) == (150, "class 1", "class 150")


def test_names_that_begin_alike_are_told_apart(copy: Path) -> None:
    (copy / "objectInfo150.txt").write_text("1\tscreen, crt\n2\tscreen, door\n")
    assert read_ade20k(copy, "training").classes == ("screen, crt", "screen, door")


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda root: shutil.rmtree(root), "no such folder"),
        (lambda root: shutil.rmtree(root / "annotations"), "there is no annotations/training"),
        (lambda root: [p.unlink() for p in (root / "images/training").iterdir()], "no images in"),
        (
            lambda root: (root / "images/training/ADE_train_00000002.png").write_bytes(b""),
            "ADE_train_00000002.jpg and ADE_train_00000002.png have one label map",
        ),
        (
            lambda root: (root / "annotations/training/ADE_train_00000002.png").unlink(),
            "ADE_train_00000002.jpg has no label map",
        ),
        (
            lambda root: (root / "objectInfo150.txt").write_text("Idx\tName\n1\ta\n3\tb\n"),
            "got '3' for class 2",
        ),
        (lambda root: (root / "objectInfo150.txt").write_text("1\ta\n2\ta\n"), "named twice"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(spoil: object, complaint: str, copy: Path) -> None:
    spoil(copy)  # type: ignore[operator]
    with pytest.raises(ValueError, match=f"^data: .*{complaint}"):
        read_ade20k(copy, "training")


def test_what_is_wrong_with_a_scene_is_said(tmp_path: Path) -> None:
    image, labels = tmp_path / "a.jpg", tmp_path / "a.png"
    Image.new("RGB", (6, 4)).save(image)
    for picture, complaint in (
        (Image.new("L", (4, 6)), "expected the 6 × 4 of its image, got 4 × 6"),
        (Image.new("RGB", (6, 4)), "one channel, got mode RGB"),
    ):
        picture.save(labels)
        with pytest.raises(ValueError, match=rf"a\.png: .*{complaint}"):
            read_scene(image, labels, 3)
    labels.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot read the label map"):
        read_scene(image, labels, 3)
    image.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot read the image"):
        read_scene(image, labels, 3)


def test_what_is_left_out_is_noted(job: SegmentationJob, tmp_path: Path) -> None:
    data = write_scenes(tmp_path / "data")
    job = replace(job, data=str(data), val_share=0.3)
    ordinary = notes_of(open_segmentation(job, "cpu"))
    assert not any("label map" in note or "classes" in note for note in ordinary)
    for number in (1, 2):
        (data / "images" / "training" / f"ADE_train_0000000{number}.jpg").unlink()
    (data / "objectInfo150.txt").unlink()
    assert notes_of(open_segmentation(job, "cpu")) == [
        *ordinary,
        "label maps in annotations/training without an image are left out: 2, as "
        "ADE_train_00000001.png",
        "there is no objectInfo150.txt to name the classes: they are ADE20K's 150, by number",
    ]
