"""Where predicted label maps may be written: over nothing that is read, and no two into one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from spt_kernels.segmentation import (
    LabelledScenes,
    SceneForm,
    evaluate_scenes,
    label_images,
    read_ade20k,
)
from spt_kernels.segmentation.pictures import check_folder

NO_MODEL: Any = None  # what is refused before the model is asked for anything
FORM = SceneForm((0.5,) * 3, (0.5,) * 3, 32, 21)
CPU = torch.device("cpu")


def photo(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(path)
    return path


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def scenes(data: Path, tmp_path: Path) -> LabelledScenes:
    return read_ade20k(shutil.copytree(data, tmp_path / "scenes"), "validation")


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(tmp_path: Path) -> None:
    """It was found out when the first label map was there."""
    file = tmp_path / "file"
    file.touch()
    places = [file / "labels", file / "labels" / "of" / "val"]
    places += [Path("/proc/labels")] if Path("/proc/self").is_dir() else []
    for place in places:
        with pytest.raises(ValueError, match=rf"^save_predictions: cannot write to {place} \("):
            check_folder(place, force=True)
    check_folder(tmp_path / "new" / "labels", force=False)
    check_folder(tmp_path, force=True)
    assert list(tmp_path.iterdir()) == [file], "nothing is left behind"


def test_a_photograph_is_not_replaced_by_its_label_map(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    image = photo(photos / "a.png")
    (tmp_path / "link").symlink_to(photos)
    before = files_in(tmp_path)
    for folder in (photos, photos / ".." / "photos", tmp_path / "link"):
        with pytest.raises(ValueError, match=r"^save_to: .*a\.png is read, and a predicted label"):
            label_images(NO_MODEL, [image], folder)
    assert files_in(tmp_path) == before


def test_two_images_do_not_share_a_file(tmp_path: Path) -> None:
    image, other = photo(tmp_path / "a.png"), photo(tmp_path / "a-overlay.png")
    namesake = photo(tmp_path / "more" / "a.jpg")
    for images in ([image, other], [other, image], [image, namesake]):
        with pytest.raises(ValueError, match=r"^images: .* would both be written as a.*\.png"):
            label_images(NO_MODEL, images, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_neither_images_nor_true_label_maps_are_replaced(scenes: LabelledScenes) -> None:
    truth = scenes.annotations[0].parent
    before = files_in(truth.parents[1])
    with pytest.raises(ValueError, match=r"^save_to: .*annotations/validation/.*png is read"):
        evaluate_scenes(nn.Identity(), scenes, FORM, CPU, save_to=truth)
    own = [path.with_suffix(".png") for path in scenes.paths]
    for path in own:
        photo(path)
    with pytest.raises(ValueError, match=r"^save_to: .*images/validation/.*png is read"):
        evaluate_scenes(
            nn.Identity(), replace(scenes, paths=tuple(own)), FORM, CPU, save_to=own[0].parent
        )
    assert {path: data for path, data in files_in(truth.parents[1]).items() if path in before} == (
        before
    )
