"""VTAB-1k as the field shares it: its lists, its classes, what is missing all at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from spt_kernels.benchmarks import vtab_tasks
from spt_kernels.benchmarks.vtab import VTAB
from spt_kernels.finetuning import read_splits
from tests.finetuning.official_folders import write_image


def write_vtab(root: Path, task: str, labels: int = 4) -> Path:
    """One task: eight images to train on, two to validate, three to test."""
    sizes = {"train800": 8, "val200": 2, "train800val200": 10, "test": 3}
    for split, count in sizes.items():
        lines = []
        for place in range(count):
            path = f"images/{split}/{place:06}.jpg"
            write_image(root / task / path, place % labels)
            lines.append(f"{path} {place % labels}\n")
        (root / task / f"{split}.txt").write_text("".join(lines))
    return root / task


def test_options_are_chosen_without_the_images_of_the_result(tmp_path: Path) -> None:
    folder = write_vtab(tmp_path, "kitti")
    (task,) = vtab_tasks(tmp_path, ["kitti"])
    assert (task.name, task.title, task.group) == ("kitti", "KITTI/distance", "Structured")
    choose, final = read_splits(task.choose), read_splits(task.final)
    assert (len(choose.train), len(choose.val or ()), choose.test) == (8, 2, None)
    assert (len(final.train), final.val, len(final.test or ())) == (10, None, 3)
    assert final.train.paths[9] == folder / "images/train800val200/000009.jpg"
    assert final.train.labels[:5] == (0, 1, 2, 3, 0)


def test_the_head_has_every_class_though_the_lists_lack_some(tmp_path: Path) -> None:
    write_vtab(tmp_path, "sun397", labels=2)
    (task,) = vtab_tasks(tmp_path, ["sun397"])
    for source in (task.choose, task.final):
        assert read_splits(source).train.classes == tuple(str(n) for n in range(397))


def test_the_nineteen_tasks_are_those_of_the_benchmark() -> None:
    groups = [known.group for known in VTAB.values()]
    assert [groups.count(g) for g in ("Natural", "Specialized", "Structured")] == [7, 4, 8]
    assert len({known.title for known in VTAB.values()}) == 19
    # as Zhai et al. (2019) list them; Caltech101 with its background
    counts = "100 102 47 102 37 10 397 2 10 45 5 8 6 6 4 16 16 18 9"
    assert [known.num_classes for known in VTAB.values()] == list(map(int, counts.split()))


def test_all_that_is_incomplete_is_named_at_once(tmp_path: Path) -> None:
    write_vtab(tmp_path, "kitti")
    write_vtab(tmp_path, "eurosat", labels=3)
    (tmp_path / "eurosat" / "val200.txt").unlink()
    (tmp_path / "eurosat" / "test.txt").unlink()
    write_vtab(tmp_path, "svhn")
    (tmp_path / "svhn" / "test.txt").write_text("a.jpg 1\nb.jpg 10\n")
    with pytest.raises(ValueError, match="incomplete") as caught:
        vtab_tasks(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"VTAB-1k: expected {tmp_path}/<task>/ with train800.txt, val200")
    assert len(lines) == 1 + 18
    assert f"  eurosat: {tmp_path / 'eurosat'}: lacks val200.txt, test.txt" in lines
    assert (
        f"  svhn: {tmp_path / 'svhn' / 'test.txt'}, line 2: expected a label from 0 to 9, got '10'"
    ) in lines
    assert f"  dtd: {tmp_path / 'dtd'}: no such folder" in lines
    assert not any("kitti" in line for line in lines)


def test_tasks_come_in_the_order_of_the_tables_and_an_unknown_one_is_refused(
    tmp_path: Path,
) -> None:
    for name in ("kitti", "cifar"):
        write_vtab(tmp_path, name)
    assert [task.name for task in vtab_tasks(tmp_path, ["kitti", "cifar"])] == ["cifar", "kitti"]
    with pytest.raises(ValueError, match=r"tasks: expected of cifar, caltech101, .* got 'cifar10'"):
        vtab_tasks(tmp_path, ["kitti", "cifar10"])
