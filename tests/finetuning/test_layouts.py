"""Data sets as their authors share them: what is read, held out, and refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from scipy.io import savemat
from torchvision.datasets import StanfordCars

from spt_kernels.errors import MissingExtra
from spt_kernels.finetuning.images.labelled import LabelledImages
from spt_kernels.finetuning.images.layouts import LAYOUTS, read_layout
from spt_kernels.finetuning.images.splits import ImageSource, read_splits, read_test_images

from .official_folders import (
    CARS,
    write_cars,
    write_cub,
    write_dogs,
    write_flowers,
    write_merged_cars,
    write_nabirds,
    write_vpt,
)


def named(images: LabelledImages) -> list[tuple[str, str]]:
    return [(p.name, images.classes[n]) for p, n in zip(images.paths, images.labels, strict=True)]


def test_cub_is_read_by_its_four_files(tmp_path: Path) -> None:
    train, val, test = read_layout("cub-200-2011", write_cub(tmp_path))
    assert train.classes[1] == "002.Laysan_Albatross"
    assert (train.counts(), val, test.counts()) == ([4, 4, 4], None, [1, 1, 1])
    assert named(test)[2] == ("Sooty_Albatross_0002.jpg", "003.Sooty_Albatross")


def test_numbers_of_nabirds_that_no_image_has_are_no_classes(tmp_path: Path) -> None:
    train, _, test = read_layout("nabirds", write_nabirds(tmp_path))
    assert train.classes == ("Oak Titmouse", "Verdin (Adult, 1st year)")
    assert (train.counts(), test.counts()) == ([2, 2], [1, 1])
    assert {path.parent.name for path in test.take([0]).paths} == {"1010"}
    assert test.labels[0] == 1


def test_classes_of_one_name_are_told_apart_by_number(tmp_path: Path) -> None:
    write_nabirds(tmp_path)
    (tmp_path / "classes.txt").write_text("817 Verdin\n1010 Verdin\n")
    assert read_layout("nabirds", tmp_path)[0].classes == ("817 Verdin", "1010 Verdin")


def test_flowers_have_validation_images_of_their_own(tmp_path: Path) -> None:
    train, val, test = read_layout("oxford-flowers", write_flowers(tmp_path))
    assert val is not None
    assert named(train) == [
        ("image_00006.jpg", "3"),
        ("image_00004.jpg", "1"),
        ("image_00005.jpg", "2"),
    ]
    assert [p.name[-5:] for p in val.paths + test.paths] == [f"{n}.jpg" for n in (7, 8, 9, 1, 2, 3)]


@pytest.mark.parametrize("lists", ["lists", "."])
def test_dogs_are_called_by_their_folders(tmp_path: Path, lists: str) -> None:
    train, _, test = read_layout("stanford-dogs", write_dogs(tmp_path, lists))
    assert train.classes == ("n02085620-Chihuahua", "n02085782-Japanese_spaniel")
    assert train.labels == (0, 0, 1, 1)
    assert [path.parent.name for path in test.paths] == list(train.classes)


def test_cars_are_what_torchvision_reads(tmp_path: Path) -> None:
    root = write_cars(tmp_path / "stanford_cars")
    train, val, test = read_layout("stanford-cars", root)
    assert val is None
    for images, split in ((train, "train"), (test, "test")):
        theirs = StanfordCars(tmp_path, split)
        assert list(images.classes) == theirs.classes == CARS
        assert [(str(p), n) for p, n in zip(images.paths, images.labels, strict=True)] == [
            (path, int(label)) for path, label in theirs._samples
        ]


def test_cars_as_kaggle_packs_them_and_as_one_file(tmp_path: Path) -> None:
    official = read_layout("stanford-cars", write_cars(tmp_path / "official"))
    nested = read_layout("stanford-cars", write_cars(tmp_path / "nested", nested=True))
    for one, other in zip(official, nested, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or named(one) == named(other)
    (tmp_path / "merged").mkdir()
    train, _, test = read_layout("stanford-cars", write_merged_cars(tmp_path / "merged"))
    assert named(train) == [(f"{n:06}.jpg", CARS[n - 1]) for n in (1, 2, 3)]
    assert named(test) == [(f"{n + 3:06}.jpg", CARS[n - 1]) for n in (1, 2, 3)]


def test_vpts_splits_decide_where_they_are(tmp_path: Path) -> None:
    write_cub(tmp_path)
    names = sorted(str(p.relative_to(tmp_path / "images")) for p in tmp_path.rglob("*.jpg"))
    label = {name: int(name[:3]) for name in names}
    splits = {"train": names[::3], "val": names[1::3], "test": names[2::3]}
    write_vpt(tmp_path, {split: {n: label[n] for n in own} for split, own in splits.items()})
    found = read_layout("cub-200-2011", tmp_path)
    for images, own in zip(found, splits.values(), strict=True):
        assert images is not None
        assert images.paths == tuple(tmp_path / "images" / name for name in own)
        assert [int(images.classes[n]) for n in images.labels] == [label[name] for name in own]


def test_vpts_paths_may_begin_at_the_root_and_its_classes_are_in_the_order_of_numbers(
    tmp_path: Path,
) -> None:
    write_flowers(tmp_path)
    rows = {f"jpg/image_{n:05}.jpg": label for n, label in ((1, 10), (2, 9), (3, 2))}
    write_vpt(tmp_path, dict.fromkeys(("train", "val", "test"), rows))
    assert read_layout("oxford-flowers", tmp_path)[0].classes == ("2", "9", "10")
    (tmp_path / "val.json").unlink()
    with pytest.raises(ValueError, match=r"val\.json: no such file; VPT's splits are train\.json"):
        read_layout("oxford-flowers", tmp_path)


def test_held_out_images_are_the_same_for_every_seed_and_trained_ones_are_drawn(
    tmp_path: Path,
) -> None:
    source = ImageSource(str(write_cub(tmp_path)), layout="cub-200-2011", train_images=6)
    one, other = read_splits(source, seed=1), read_splits(source, seed=2)
    assert one.is_held_out
    assert one.val is not None
    assert one.val.counts() == [1, 1, 1]
    assert one.val == other.val
    assert one.train.counts() == [2, 2, 2]
    assert one.train != other.train
    assert not {*one.val.paths} & {*one.train.paths, *other.train.paths}


def test_a_source_trains_on_all_or_leaves_the_test_images_alone(tmp_path: Path) -> None:
    place = str(write_flowers(tmp_path))
    whole = read_splits(ImageSource(place, layout="oxford-flowers", train_on_val=True))
    assert (whole.train.counts(), whole.val) == ([2, 2, 2], None)
    assert whole.test == read_test_images(ImageSource(place, layout="oxford-flowers"))
    source = ImageSource(place, layout="oxford-flowers", use_test=False)
    parts = read_splits(source)
    assert (len(parts.train), len(parts.val or ()), parts.test) == (3, 3, None)
    assert not parts.is_held_out
    with pytest.raises(ValueError, match="left its test images alone"):
        read_test_images(source)


def write_broken_cub(file: str, text: str | None) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        write_cub(root)
        (root / file).unlink() if text is None else (root / file).write_text(text)
        return root

    return write


def write_other_cars(root: Path) -> Path:
    write_cars(root)
    savemat(root / "devkit" / "cars_train_annos.mat", {"other": [1]})
    return root


def write_text_cars(root: Path) -> Path:
    write_cars(root)
    (root / "cars_test_annos_withlabels.mat").write_text("moved")
    return root


def write_unlabelled_cars(root: Path) -> Path:
    write_cars(root)
    (root / "cars_test_annos_withlabels.mat").unlink()
    return root


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("cub-200-2011", write_broken_cub("images.txt", None), r"images\.txt: cannot read"),
        ("cub-200-2011", write_broken_cub("images.txt", "1\n"), "line 1: expected two columns"),
        ("cub-200-2011", write_broken_cub("image_class_labels.txt", "1 2\n"), "no line for 14"),
        ("cub-200-2011", write_broken_cub("image_class_labels.txt", "1 x\n"), "a number for each"),
        (
            "cub-200-2011",
            write_broken_cub("train_test_split.txt", "".join(f"{n} 2\n" for n in range(16))),
            "expected 0 or 1, got '0 2'",
        ),
        (
            "cub-200-2011",
            write_broken_cub("images/002.Laysan_Albatross/Laysan_Albatross_0001.jpg", None),
            "Laysan_Albatross_0001.jpg: no such file, though the data set lists it",
        ),
        ("stanford-cars", write_other_cars, "expected a variable annotations, found other"),
        ("stanford-cars", write_text_cars, "cannot read the .mat file"),
        (
            "stanford-cars",
            write_unlabelled_cars,
            r"cars_test_annos_withlabels.mat: no such file or folder \(nor ",
        ),
        ("cars", write_cars, "layout: expected one of cub-200-2011, nabirds"),
    ],
)
def test_what_is_missing_or_malformed_is_named(
    tmp_path: Path, name: str, write: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_layout(name, write(tmp_path))


def write_folders_of_classes(root: Path) -> Path:
    for name in ("train/red", "test/red", *"abcdef"):
        (root / name).mkdir(parents=True)
    return root


def write_cub_below(root: Path) -> Path:
    write_cub(root / "CUB_200_2011")
    return root


@pytest.mark.parametrize(
    ("name", "write", "found", "fits"),
    [
        (
            *("oxford-flowers", write_cub, "classes.txt, image_class_labels.txt, images/, "),
            "that is the `layout` cub-200-2011 or nabirds",
        ),
        ("cub-200-2011", write_dogs, "Images/, lists/", "that is the `layout` stanford-dogs"),
        ("stanford-dogs", write_cars, "cars_test/", "that is the `layout` stanford-cars"),
        ("nabirds", write_merged_cars, "car_ims/", "that is the `layout` stanford-cars"),
        ("stanford-cars", write_flowers, "imagelabels.mat", "that is the `layout` oxford-flowers"),
        ("cub-200-2011", write_cub_below, "CUB_200_2011/", "name the folder {root}/CUB_200_2011"),
        (
            *("nabirds", write_folders_of_classes, "a/, b/, c/, d/, e/, f/, …"),
            "without `layout`, the folders in train/ are the classes",
        ),
    ],
)
def test_a_folder_of_another_layout_is_told_from_a_broken_one(
    tmp_path: Path, name: str, write: Callable[[Path], Path], found: str, fits: str
) -> None:
    with pytest.raises(ValueError, match=r"^data: expected ") as caught:
        read_layout(name, write(tmp_path))
    complaint = str(caught.value)
    assert f"expected {LAYOUTS[name].title} in {tmp_path}, with " in complaint
    assert found in complaint.partition("found ")[2]
    assert complaint.endswith(fits.format(root=tmp_path))


def test_more_classes_than_a_data_set_has_are_refused(tmp_path: Path) -> None:
    rows = {f"{n}.jpg": n for n in range(121)}
    write_vpt(tmp_path, dict.fromkeys(("train", "val", "test"), rows))
    with pytest.raises(ValueError, match="Stanford Dogs has 120 classes, its files list 121"):
        LAYOUTS["stanford-dogs"].listing(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "expected an object of paths and classes"),
        ("{", "cannot read the split"),
        ('{"a.jpg": 1.5}', "expected a number or a name for a.jpg, got 1.5"),
        ('{"a.jpg": 3}', "class 3 has no image in train.json"),
    ],
)
def test_malformed_splits_of_vpt_are_refused(tmp_path: Path, content: str, message: str) -> None:
    rows = {"a.jpg": 1}
    write_vpt(tmp_path, dict.fromkeys(("train", "val", "test"), rows))
    (tmp_path / "test.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        LAYOUTS["nabirds"].listing(tmp_path)


def test_without_scipy_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_flowers(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(MissingExtra, match=r"reading imagelabels.mat needs scipy: pip install"):
        read_layout("oxford-flowers", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "imagenet"}, "layout: expected one of"),
        ({"layout": "nabirds", "train_list": "x"}, "layout, train_list"),
        ({"num_classes": 4}, "num_classes: folders tell their own"),
        ({"num_classes": 1, "train_list": "x"}, "at least two"),
        ({"train_list": "x", "test_list": "y", "use_test": False}, "test_list, use_test"),
    ],
)
def test_impossible_sources_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSource("data", **change)
