"""A benchmark of one's own: folders and lists of images in groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from spt_kernels.benchmarks import folder_tasks
from spt_kernels.finetuning import read_splits
from tests.finetuning.pictures_on_disk import write_images


def write_own(root: Path) -> Path:
    """Three tasks in two groups: with folders, without validation images, and with lists."""
    counts = {"cat": 10, "dog": 10}
    for split in ("train", "val", "test"):
        write_images(root / "animals" / "pets" / split, counts)
    for split in ("train", "test"):
        write_images(root / "animals" / "farm" / split, counts)
    write_images(root / "plants" / "trees" / "images", {"oak": 6, "elm": 6})
    for split, places in {"train": range(3), "val": range(3, 4), "test": range(4, 6)}.items():
        lines = [f"images/{name}/{n:03}.png {name}\n" for name in ("oak", "elm") for n in places]
        (root / "plants" / "trees" / f"{split}.txt").write_text("".join(lines))
    return root


def test_the_last_run_trains_on_the_validation_images_as_well(tmp_path: Path) -> None:
    tasks = {task.name: task for task in folder_tasks(write_own(tmp_path))}
    assert {name: task.group for name, task in tasks.items()} == {
        **{"farm": "animals", "pets": "animals"},
        "trees": "plants",
    }
    sizes = {}
    for name, task in tasks.items():
        choose, final = read_splits(task.choose), read_splits(task.final)
        assert (choose.test, final.val) == (None, None)
        assert choose.val is not None
        assert final.test is not None
        assert {*choose.train.paths, *choose.val.paths} == {*final.train.paths}
        sizes[name] = (len(choose.train), len(choose.val), len(final.test))
    assert sizes == {"pets": (20, 20, 20), "farm": (18, 2, 20), "trees": (6, 2, 4)}


def test_what_is_missing_is_named_at_once(tmp_path: Path) -> None:
    write_own(tmp_path)
    (tmp_path / "animals" / "farm" / "test").rename(tmp_path / "animals" / "farm" / "tset")
    (tmp_path / "plants" / "trees" / "test.txt").unlink()
    with pytest.raises(ValueError, match="expected <group>/<task>/") as caught:
        folder_tasks(tmp_path)
    assert str(caught.value).splitlines()[1:] == [
        f"  farm: {tmp_path / 'animals' / 'farm'}: has no test/ and no test.txt",
        f"  trees: {tmp_path / 'plants' / 'trees'}: has train.txt and no test.txt",
    ]
    assert [task.name for task in folder_tasks(tmp_path, ["pets"])] == ["pets"]


def test_folders_that_are_no_benchmark_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        folder_tasks(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected folders <group>/<task>/, found none"):
        folder_tasks(tmp_path)
    write_own(tmp_path)
    with pytest.raises(ValueError, match="is a task where a group was expected"):
        folder_tasks(tmp_path / "animals")
    with pytest.raises(ValueError, match=r"is one task; expected folders <group>/<task>/ with"):
        folder_tasks(tmp_path / "animals" / "pets")
    (tmp_path / "plants" / "pets").mkdir()
    with pytest.raises(ValueError, match="has the same name"):
        folder_tasks(tmp_path)
