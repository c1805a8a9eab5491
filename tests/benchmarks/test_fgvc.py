"""FGVC: five data sets in one folder, from there to a run that finds its images again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spt_kernels.benchmarks import fgvc_tasks
from spt_kernels.finetuning import (
    FinetuneJob,
    Method,
    Recipe,
    SavedRun,
    finetune,
    images_of,
    read_splits,
)
from spt_kernels.finetuning.demo import one_thread
from tests.finetuning.official_folders import (
    write_cars,
    write_cub,
    write_dogs,
    write_flowers,
    write_nabirds,
)
from tests.finetuning.pictures_on_disk import write_weights

WRITERS: dict[str, Callable[[Path], Path]] = {
    "CUB_200_2011": write_cub,
    "nabirds": write_nabirds,
    "OxfordFlower": write_flowers,
    "stanford_dogs": write_dogs,
    "Stanford-cars": write_cars,
}


def write_fgvc(root: Path) -> Path:
    for folder, write in WRITERS.items():
        (root / folder).mkdir(parents=True)
        write(root / folder)
    return root


def test_five_tasks_choose_without_their_test_images(tmp_path: Path) -> None:
    tasks = fgvc_tasks(write_fgvc(tmp_path))
    assert [task.title for task in tasks] == [
        *("CUB-200-2011", "NABirds", "Oxford Flowers", "Stanford Dogs", "Stanford Cars")
    ]
    for task in tasks:
        choose, final = read_splits(task.choose, seed=3), read_splits(task.final, seed=4)
        assert choose.test is None
        assert final.test is not None
        # as those who compare on FGVC do, the validation images stay aside in the last run
        assert (final.train, final.val) == (choose.train, choose.val)
        assert final.val is not None
        assert task.group == "FGVC"


def test_all_that_is_incomplete_is_named_at_once(tmp_path: Path) -> None:
    write_fgvc(tmp_path)
    (tmp_path / "CUB_200_2011" / "images.txt").unlink()
    (tmp_path / "nabirds").rename(tmp_path / "birds")
    with pytest.raises(ValueError, match="FGVC: expected a folder for each data set") as caught:
        fgvc_tasks(tmp_path)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 2
    assert "cub-200-2011" in lines[0]
    assert "images.txt: cannot read the list" in lines[0]
    assert lines[1] == f"  nabirds: {tmp_path}: no folder called nabirds"
    with pytest.raises(ValueError, match="no such folder"):
        fgvc_tasks(tmp_path / "nowhere", ["nabirds"])


def test_a_run_on_an_official_layout_is_resumed_and_evaluated_on_its_own_images(
    tmp_path: Path,
) -> None:
    write_cub(tmp_path / "cub_200_2011")
    (task,) = fgvc_tasks(tmp_path, ["cub-200-2011"])
    recipe = Recipe(epochs=1, batch_size=4)
    base = write_weights(tmp_path / "base.safetensors")
    job = FinetuneJob(base, task.final, Method("linear"), recipe)
    folder = tmp_path / "run"
    with one_thread():
        result = finetune(job, folder, device="cpu")
        assert finetune(FinetuneJob.from_json(job.to_json()), folder, resume=True) == result
        images = images_of(SavedRun.find(folder))
    assert result["images"] == {"train": 9, "val": 3, "test": 3}
    assert images == read_splits(task.final).test
    log = (folder / "log.txt").read_text()
    assert "the data set has no validation images: 3 of those to train on are held out" in log
