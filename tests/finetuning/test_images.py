"""Folders and lists of images: what is found, in which order, drawn how, and what is refused."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from spt_kernels.finetuning.images.labelled import (
    LabelledImages,
    draw_balanced,
    draw_proportional,
    read_list,
)
from spt_kernels.finetuning.images.splits import ImageSource, read_evaluation_images, read_splits

from .pictures_on_disk import write_images, write_task


def some(counts: dict[str, int]) -> LabelledImages:
    labels = [label for label, count in enumerate(counts.values()) for _ in range(count)]
    paths = tuple(Path(f"{place}.png") for place in range(len(labels)))
    return LabelledImages(paths, tuple(labels), tuple(counts))


def test_restricting_gives_labels_in_the_order_asked_for() -> None:
    kept = some({"a": 1, "b": 2, "c": 1}).restrict(("c", "b"))
    assert kept.labels == (1, 1, 0)
    assert [path.name for path in kept.paths] == ["1.png", "2.png", "3.png"]
    with pytest.raises(ValueError, match="'d' is not among"):
        kept.restrict(("d",))
    with pytest.raises(ValueError, match="named twice"):
        kept.restrict(("b", "b"))


@pytest.mark.parametrize(
    ("count", "expected"), [(6, [2, 2, 2]), (7, [3, 2, 2]), (11, [5, 4, 2]), (99, [9, 4, 2])]
)
def test_a_balanced_draw_takes_as_many_of_each_class_as_it_can(
    count: int, expected: list[int]
) -> None:
    images = some({"a": 9, "b": 4, "c": 2})
    chosen, rest = draw_balanced(images, count, seed=0)
    assert chosen.counts() == expected
    assert sorted(chosen.paths + rest.paths) == sorted(images.paths)
    assert draw_balanced(images, count, seed=0)[0] == chosen


def test_another_seed_draws_other_images() -> None:
    images = some({"a": 50, "b": 50})
    assert draw_balanced(images, 20, seed=0)[0] != draw_balanced(images, 20, seed=1)[0]


def test_a_proportional_draw_leaves_something_of_each_class() -> None:
    chosen, rest = draw_proportional(some({"a": 20, "b": 2, "c": 1}), 0.1, seed=0)
    assert chosen.counts() == [2, 1, 0]
    assert rest.counts() == [18, 1, 1]


def test_a_list_of_numbers_or_names(tmp_path: Path) -> None:
    write_images(tmp_path, {"x": 3})
    lines = tmp_path / "train.txt"
    lines.write_text("x/000.png 2\n\nx/001.png 0\n")
    found = read_list(lines, tmp_path)
    assert found.classes == ("0", "1", "2")
    assert found.labels == (2, 0)
    (tmp_path / "x" / "with space.png").write_bytes((tmp_path / "x" / "000.png").read_bytes())
    lines.write_text("x/with space.png toad\nx/001.png frog\n")
    assert read_list(lines, tmp_path).classes == ("frog", "toad")
    lines.write_text('x/with space.png\ttree frog, "green"\nx/001.png\tKröte\n')
    assert read_list(lines, tmp_path).classes == ("Kröte", 'tree frog, "green"')
    lines.write_text("x/000.png 007\nx/001.png 12\n")
    assert read_list(lines, tmp_path).classes == ("007", "12")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["unix", "windows"])
def test_a_list_is_read_as_windows_writes_it(tmp_path: Path, encoding: str, newline: str) -> None:
    write_images(tmp_path, {"x": 2})
    (tmp_path / "x" / "000.png").rename(tmp_path / "x" / "grün\u2028.png")
    lines = f"x/grün\u2028.png a{newline}x/001.png b{newline}"
    (tmp_path / "train.txt").write_bytes(lines.encode(encoding))
    found = read_list(tmp_path / "train.txt", tmp_path)
    assert found.classes == ("a", "b")
    assert [path.name for path in found.paths] == ["grün\u2028.png", "001.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x/000.png\n", "line 1: expected 'path label'"),
        ("x/000.png 0\nx/none.png 1\n", "line 2: no such file"),
        ("x/000.png -1\n", "labels start at 0"),
        ("\n", "the list is empty"),
    ],
    ids=["no label", "no file", "negative", "empty"],
)
def test_a_malformed_list_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    write_images(tmp_path, {"x": 1})
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_list(tmp_path / "train.txt", tmp_path)


def test_a_binary_list_and_an_unknown_label_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path, {"x": 1})
    with pytest.raises(ValueError, match="not a text file"):
        read_list(tmp_path / "x" / "000.png", tmp_path)
    (tmp_path / "test.txt").write_text("x/000.png 7\n")
    with pytest.raises(ValueError, match="'7' is none of the 2 classes, 0, 1"):
        read_list(tmp_path / "test.txt", tmp_path, ("0", "1"))


def test_validation_images_are_held_out_of_training_never_of_test(tmp_path: Path) -> None:
    write_task(tmp_path, train=10, test=5)
    splits = read_splits(ImageSource(str(tmp_path), val_share=0.2))
    assert splits.val is not None
    assert splits.test is not None
    assert splits.val.counts() == [2, 2, 2]
    assert splits.train.counts() == [8, 8, 8]
    assert not set(splits.train.paths) & set(splits.val.paths)
    assert all("/train/" in str(path) for path in splits.train.paths + splits.val.paths)
    assert splits.test.counts() == [5, 5, 5]
    assert all("/test/" in str(path) for path in splits.test.paths)


def test_a_drawn_training_set_is_validated_on_images_not_drawn(tmp_path: Path) -> None:
    write_task(tmp_path, train=10)
    splits = read_splits(ImageSource(str(tmp_path), train_images=15, val_share=0.2))
    assert splits.val is not None
    assert splits.train.counts() == [5, 5, 5]
    assert splits.val.counts() == [1, 1, 1]
    assert not set(splits.train.paths) & set(splits.val.paths)


def test_a_val_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    write_task(tmp_path, train=4)
    write_images(tmp_path / "val", {"blue": 1, "green": 2, "red": 3})
    splits = read_splits(ImageSource(str(tmp_path)))
    assert splits.val is not None
    assert splits.val.counts() == [1, 2, 3]
    assert splits.train.counts() == [4, 4, 4]


def test_a_split_without_some_class_keeps_its_labels(tmp_path: Path) -> None:
    write_task(tmp_path, train=4)
    write_images(tmp_path / "val", {"red": 2})
    splits = read_splits(ImageSource(str(tmp_path)))
    assert splits.val is not None
    assert splits.val.labels == (2, 2)


def test_evaluation_takes_every_test_folder_that_training_took(tmp_path: Path) -> None:
    write_task(tmp_path, train=4)
    shutil.rmtree(tmp_path / "test" / "green")
    (tmp_path / "test" / "blue" / "000.png").rename(tmp_path / "elsewhere.png")
    for path in (tmp_path / "test" / "blue").iterdir():
        path.unlink()  # the folder stays, empty
    trained = read_splits(ImageSource(str(tmp_path)))
    assert trained.test is not None
    assert trained.test.counts() == [0, 0, 6]
    assert read_evaluation_images(tmp_path, trained.train.classes) == trained.test
    lines = tmp_path / "test.txt"
    lines.write_text("test/red/000.png red\n")
    listed = read_evaluation_images(tmp_path, trained.train.classes, lines)
    assert listed.labels == (2,)


def test_images_of_none_of_the_classes_are_refused(tmp_path: Path) -> None:
    write_task(tmp_path)
    with pytest.raises(ValueError, match=r"'cat' is not among the data's blue, green, red"):
        read_evaluation_images(tmp_path, ("cat", "dog"))


def test_classes_that_were_not_asked_for_may_be_in_any_split(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": 2, "b": 2, "c": 2})
    write_images(tmp_path / "test", {"a": 2, "z": 2})
    test = read_splits(ImageSource(str(tmp_path), classes=("b", "a"))).test
    assert test is not None
    assert test.labels == (1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"root": "none"}, "data: no such folder"),
        ({"classes": ("blue",)}, "at least two classes"),
        ({"classes": ("blue", "puce")}, "'puce' is not among"),
        ({"train_images": 1000}, "1000 asked for"),
        ({"train_images": 0}, "more than zero"),
        ({"val_share": 1.0}, "val_share"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_had_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    write_task(tmp_path, train=2, test=1)
    with pytest.raises(ValueError, match=message):
        read_splits(ImageSource(**{"root": str(tmp_path), **change}))


def test_a_folder_of_one_class_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"only": 3})
    with pytest.raises(ValueError, match="at least two classes, found only"):
        read_splits(ImageSource(str(tmp_path)))


def test_a_test_class_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": 2, "b": 2})
    write_images(tmp_path / "test", {"a": 2, "z": 2})
    with pytest.raises(ValueError, match="test/ has a class that train/ lacks: z"):
        read_splits(ImageSource(str(tmp_path)))


def test_evaluation_reads_the_test_folder_or_the_folder_itself(tmp_path: Path) -> None:
    write_task(tmp_path)
    asked = ("red", "blue")
    inside = read_evaluation_images(tmp_path, asked)
    direct = read_evaluation_images(tmp_path / "test", asked)
    assert inside == direct
    assert Counter(inside.labels) == {0: 6, 1: 6}
    assert inside.classes == asked


def test_images_that_are_in_two_splits_are_told(tmp_path: Path) -> None:
    root = write_task(tmp_path / "data")
    splits = read_splits(ImageSource(str(root)))
    assert splits.overlaps() == []
    (root / "val").symlink_to(root / "test")
    lines = [f"{path.relative_to(root)} {path.parent.name}" for path in splits.test.paths]
    for name, own in (("all", lines), ("some", lines[1:3])):
        (tmp_path / f"{name}.txt").write_text("\n".join(own))
    n = len(lines)
    told = f"{n} of {n} test images are validation images as well"
    assert read_splits(ImageSource(str(root))).overlaps() == [told]
    lists = {"train_list": str(tmp_path / "all.txt"), "test_list": str(tmp_path / "some.txt")}
    listed = read_splits(ImageSource(str(root), val_share=0, **lists))
    assert listed.overlaps() == ["2 of 2 test images are training images as well"]
