"""A folder per class: what is found in which order, what is hidden, linked, empty or refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torchvision

from spt_kernels.cli.options import split_names
from spt_kernels.finetuning.images.labelled import read_folder

from .pictures_on_disk import write_images


def names(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in read_folder(root).paths]


def test_a_folder_is_read_in_alphabetical_order_at_any_depth(tmp_path: Path) -> None:
    write_images(tmp_path, {"b": 2, "a": 1})
    write_images(tmp_path / "a", {"deeper": 1})
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / "folder.png").mkdir()
    found = read_folder(tmp_path)
    assert names(tmp_path) == ["a/000.png", "a/deeper/000.png", "b/000.png", "b/001.png"]
    assert found.labels == (0, 0, 1, 1)
    assert found.classes == ("a", "b")


def test_the_images_and_classes_are_those_of_torchvision(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", {"cat": 2, "Dog": 1})
    write_images(tmp_path / "elsewhere", {"more": 2}, seed=1)
    (tmp_path / "photos" / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (tmp_path / "photos" / "elk").symlink_to(tmp_path / "elsewhere")
    shutil.copy(tmp_path / "photos" / "Dog" / "000.png", tmp_path / "photos" / "Dog" / "1.PNG")
    ours = read_folder(tmp_path / "photos")
    theirs = torchvision.datasets.ImageFolder(str(tmp_path / "photos"))
    assert list(ours.classes) == theirs.classes
    assert {(str(p), n) for p, n in zip(ours.paths, ours.labels, strict=True)} == set(
        theirs.samples
    )


def test_what_systems_hide_in_folders_is_left_aside(tmp_path: Path) -> None:
    write_images(tmp_path, {"cat": 2, "dog": 1})
    expected = names(tmp_path)
    write_images(tmp_path, {".ipynb_checkpoints": 1, "__MACOSX": 1})
    write_images(tmp_path / "cat", {".ipynb_checkpoints": 1, "@eaDir": 1})
    (tmp_path / "cat" / "._000.png").write_bytes(b"\0\5\x16\7")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(b"x")
        (tmp_path / "dog" / name).write_bytes(b"x")
    assert names(tmp_path) == expected
    assert read_folder(tmp_path).classes == ("cat", "dog")


def test_links_that_lead_back_end(tmp_path: Path) -> None:
    write_images(tmp_path, {"cat": 1, "dog": 1})
    (tmp_path / "cat" / "self").symlink_to(tmp_path / "cat")
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    (tmp_path / "dog" / "sub").mkdir()
    (tmp_path / "dog" / "sub" / "back").symlink_to(tmp_path / "dog")
    assert names(tmp_path) == ["cat/000.png", "dog/000.png"]


@pytest.mark.parametrize("name", ["cat, tabby", 'the "big" one', "Kröte 蛙", " spaced ", "it's"])
def test_a_class_may_have_any_name(tmp_path: Path, name: str) -> None:
    write_images(tmp_path, {name: 1, "other": 1})
    assert set(read_folder(tmp_path).classes) == {name, "other"}


def test_names_with_commas_can_be_asked_for() -> None:
    assert split_names("a,b, c") == ("a", "b", "c")
    assert split_names('"cat, tabby",dog') == ("cat, tabby", "dog")
    assert split_names('the "big" one,it\'s') == ('the "big" one', "it's")
    assert split_names(None) == ()


def test_a_folder_without_classes_or_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        read_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"one folder per class, found none$"):
        read_folder(tmp_path)
    write_images(tmp_path, {"x": 1})
    (tmp_path / "x" / "000.png").rename(tmp_path / "loose.png")
    shutil.rmtree(tmp_path / "x")
    with pytest.raises(ValueError, match="found none but 1 images that are in no folder"):
        read_folder(tmp_path)


def test_empty_classes_are_told_in_training_and_absent_in_a_test(tmp_path: Path) -> None:
    write_images(tmp_path, {"cat": 1})
    (tmp_path / "frog").mkdir()
    (tmp_path / "newt").mkdir()
    with pytest.raises(ValueError, match=r"frog \(and 1 more folders\): no images .*moved out"):
        read_folder(tmp_path)
    assert read_folder(tmp_path, allow_empty=True).classes == ("cat",)
    shutil.rmtree(tmp_path / "cat")
    with pytest.raises(ValueError, match=r"frog .*: no images"):
        read_folder(tmp_path, allow_empty=True)
