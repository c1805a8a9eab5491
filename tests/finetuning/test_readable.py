"""Files that cannot be read are named before anything is computed, by whichever process reads."""

from __future__ import annotations

import gc
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spt_kernels.finetuning import FinetuneJob, ImageSource, Method, ModelSource, Recipe, finetune
from spt_kernels.finetuning.images import readable
from spt_kernels.finetuning.images.labelled import read_folder
from spt_kernels.finetuning.images.pixels import PixelSet, Preprocessing
from spt_kernels.finetuning.progress import Silent

from .pictures_on_disk import write_images

HALF = (0.5, 0.5, 0.5)
FORM = Preprocessing(8, HALF, HALF)


class Stages(Silent):
    """Remembers what has begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def start(self, stage: str, total: int) -> None:
        self.begun.append(stage)


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_processes_that_read_end_with_the_error_of_one(error: type[Exception]) -> None:
    """They waited for the garbage collector, which then waited five seconds for each."""

    def read(number: int) -> int:
        if number == 2:
            raise error("cannot read 2")
        return number

    gc.disable()
    try:
        with pytest.raises(error, match="cannot read 2"):
            list(readable.read_in_order(range(6), read, 2))
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_damaged_image_ends_a_run_before_it_begins(
    split: str, workers: int, task: ImageSource, base: ModelSource, tmp_path: Path
) -> None:
    """One of the test images was found after the last epoch."""
    root = shutil.copytree(task.root, tmp_path / "data")
    shutil.copytree(root / "test", root / "val")
    bad = root / split / "green" / "002.png"
    bad.write_bytes(bad.read_bytes()[:200])
    job = FinetuneJob(base, replace(task, root=str(root)), Method("linear"), Recipe(epochs=1))
    stages = Stages()
    with pytest.raises(ValueError, match=rf"^{bad}: cannot read the image \([^\n]*\)$"):
        finetune(job, tmp_path / "run", workers=workers, progress=stages)
    assert set(stages.begun) <= {"reading images", "checking images"}
    assert not (tmp_path / "run").exists()


def test_of_very_many_images_the_beginning_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, {"a": 4}, size=(64, 64))
    bad = tmp_path / "a" / "003.png"
    whole = bad.read_bytes()
    monkeypatch.setattr(readable, "MANY", 3)
    for content, is_noticed in ((whole[:3000], False), (b"none", True), (whole, False)):
        bad.write_bytes(content)
        pixels = PixelSet(read_folder(tmp_path), FORM)
        if is_noticed:
            with pytest.raises(ValueError, match=r"003\.png: cannot read the image \(not an"):
                pixels.check(0, Silent())
        else:
            pixels.check(0, Silent())
    bad.write_bytes(whole[:3000])
    with pytest.raises(ValueError, match=r"003\.png: cannot read the image"):
        PixelSet(read_folder(tmp_path), FORM).check(1, Silent())


@pytest.mark.parametrize("ending", ["jpg", "jfif", "png", "tif", "gif", "webp", "bmp", "ppm"])
def test_what_can_be_read_passes_and_what_is_cut_does_not(ending: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8)
    file = tmp_path / "a" / f"0.{ending}"
    file.parent.mkdir()
    Image.fromarray(pixels).save(file)
    check = PixelSet(read_folder(tmp_path), FORM).check
    check(0, Silent())
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    with pytest.raises(ValueError, match="cannot read the image"):
        check(0, Silent())
