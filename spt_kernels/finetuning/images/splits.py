"""The training, validation and test images of one task."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from .labelled import LabelledImages, draw_balanced, draw_proportional, read_folder, read_list
from .layouts import layout_of, read_layout

VAL_FOLDERS = ("val", "valid", "validation")


@dataclass(frozen=True)
class ImageSource:
    """Where the images of a task are.

    Attributes:
        root: a folder with `train/`, and optionally `val/` and `test/`, each with a folder per
            class; or the folder that the paths in the lists start from; or that of a `layout`.
        train_list: a list of `path label` lines, in place of `train/`.
        val_list: likewise.
        test_list: likewise.
        classes: use these alone, in this order; empty for all.
        train_images: train on so many, the same number of each class; `None` for all.
        val_share: where there are no validation images, hold out this share of the training images;
            with `train_images`, take that share of them from those not drawn. 0 for none.
        layout: read the files of a known data set, one of `LAYOUTS`, in place of folders or lists.
        num_classes: the labels of the lists are the numbers below this one, whether or not each has
            an image; `None` for those that the training list has.
        use_test: whether there are test images for this; without, they are not so much as read.
        train_on_val: train on the validation images as well, and hold none out: for a last run,
            when nothing is left to choose.
    """

    root: str
    train_list: str | None = None
    val_list: str | None = None
    test_list: str | None = None
    classes: tuple[str, ...] = ()
    train_images: int | None = None
    val_share: float = 0.1
    layout: str | None = None
    num_classes: int | None = None
    use_test: bool = True
    train_on_val: bool = False

    def __post_init__(self) -> None:
        if self.train_images is not None and self.train_images < 1:
            raise ValueError(f"train_images: expected more than zero, got {self.train_images}")
        if not 0 <= self.val_share < 1:
            raise ValueError(f"val_share: expected at least 0 and below 1, got {self.val_share}")
        if self.train_list is None and (self.val_list or self.test_list):
            raise ValueError("train_list: a validation or test list needs a training list")
        if self.layout is not None:
            layout_of(self.layout)
            if self.train_list is not None:
                raise ValueError("layout, train_list: expected one of them, got both")
        if self.num_classes is not None and self.num_classes < 2:
            raise ValueError(f"num_classes: expected at least two, got {self.num_classes}")
        if self.num_classes is not None and self.train_list is None:
            raise ValueError("num_classes: folders tell their own; it is of lists")
        if self.test_list is not None and not self.use_test:
            raise ValueError("test_list, use_test: a list was given that is not to be used")


@dataclass(frozen=True)
class Splits:
    """The images of a task; what is absent is `None`. Nothing is ever chosen by the test images.

    Attributes:
        train: to train on.
        val: to choose by.
        test: to look at once, when all is chosen.
        is_held_out: whether `val` is a share of the images that were there to train on.
    """

    train: LabelledImages
    val: LabelledImages | None
    test: LabelledImages | None
    is_held_out: bool = False

    def overlaps(self) -> list[str]:
        """A line for each two splits that share images: of these an accuracy is too good."""
        named = {"training": self.train, "validation": self.val, "test": self.test}
        files = {name: _files(images) for name, images in named.items() if images is not None}
        return [
            f"{len(shared):,} of {len(there):,} {other} images are {one} images as well"
            for (one, here), (other, there) in itertools.combinations(files.items(), 2)
            if (shared := here & there)
        ]


def read_splits(source: ImageSource, seed: int = 0) -> Splits:
    """Find, restrict and draw the images of `source`; the same `seed` draws the same ones.

    Raises:
        ValueError: a folder or list is missing, malformed or empty, or fewer than two classes.
    """
    train, val, test = _all_of(source)
    if source.classes:
        train = train.restrict(source.classes)
        val, test = (
            images.restrict(source.classes, all_there=False) if images is not None else None
            for images in (val, test)
        )
    if len(train.classes) < 2:
        raise ValueError(f"{source.root}: expected at least two classes, found {train.classes[0]}")
    if source.train_images is not None and source.train_images > len(train):
        raise ValueError(
            f"train_images: {source.train_images} asked for, {source.root} has {len(train)}"
        )
    if source.train_on_val:
        train, val = train if val is None else train.joined(val), None
    is_held_out = val is None and source.val_share > 0 and not source.train_on_val
    if is_held_out:
        train, val = _hold_out(train, source, seed)
    elif source.train_images is not None:
        train, _ = draw_balanced(train, source.train_images, seed)
    return Splits(train, val, test, is_held_out and val is not None)


def may_have_validation(source: ImageSource) -> bool:
    """Whether there may be validation images of `source`, told before its images are read.

    Raises:
        ValueError: as `read_layout`.
    """
    if source.train_on_val:
        return False
    if source.val_share > 0:
        return True
    if source.layout is not None:
        return read_layout(source.layout, source.root)[1] is not None
    if source.train_list is not None:
        return source.val_list is not None
    return any((Path(source.root) / name).is_dir() for name in VAL_FOLDERS)


def read_evaluation_images(
    root: str | os.PathLike[str],
    classes: tuple[str, ...] | None,
    file: str | os.PathLike[str] | None = None,
) -> LabelledImages:
    """The images to evaluate on: the list `file`, or `root/test`, or `root` itself.

    With `classes`, these alone, as many of them as there are images of.

    Raises:
        ValueError: a folder or list is missing, malformed or empty, or has none of `classes`.
    """
    if file is not None:
        images = read_list(file, root)
    else:
        root = Path(root)
        folder = root / "test" if (root / "test").is_dir() else root
        images = read_folder(folder, allow_empty=classes is not None)
    return images if classes is None else images.restrict(classes, all_there=False)


def read_test_images(source: ImageSource) -> LabelledImages:
    """The test images of `source`, with all of their classes, labelled as the data has them.

    Raises:
        ValueError: it has none or leaves them alone, or a folder or list is missing or malformed.
    """
    if not source.use_test:
        raise ValueError(
            "data: the run was to choose by and left its test images alone; name the images"
        )
    if source.layout is not None:
        return read_layout(source.layout, source.root)[2]
    if source.test_list is not None:
        return read_list(source.test_list, source.root)
    return read_test_folder(source.root)


def read_test_folder(root: str | os.PathLike[str]) -> LabelledImages:
    """The images of `root/test`, or of `root` itself.

    Raises:
        ValueError: a folder is missing or malformed, or there is `train/` and no `test/`.
    """
    root = Path(root)
    if not (root / "test").is_dir() and (root / "train").is_dir():
        raise ValueError(f"data: {root} has train/ but no test/; name the folder of the images")
    return read_folder(root / "test" if (root / "test").is_dir() else root)


def _all_of(
    source: ImageSource,
) -> tuple[LabelledImages, LabelledImages | None, LabelledImages | None]:
    """The training, validation and test images that there are."""
    if source.layout is not None:
        train, val, test = read_layout(source.layout, source.root)
        return train, val, test if source.use_test else None
    train_or_none = _read(source, "train", source.train_list, None)
    assert train_or_none is not None
    val_or_none = _read(source, "val", source.val_list, train_or_none)
    if not source.use_test:
        return train_or_none, val_or_none, None
    return train_or_none, val_or_none, _read(source, "test", source.test_list, train_or_none)


def _hold_out(
    train: LabelledImages, source: ImageSource, seed: int
) -> tuple[LabelledImages, LabelledImages | None]:
    wanted = source.train_images
    if source.layout is not None:
        # part of a known data set, and so the same for every seed
        val, rest = draw_proportional(train, source.val_share, seed=0)
        if wanted is not None:
            rest, _ = draw_balanced(rest, wanted, seed)
        return rest, val if len(val) else None
    if wanted is None:
        val, rest = draw_proportional(train, source.val_share, seed)
        return rest, val if len(val) else None
    chosen, spare = draw_balanced(train, wanted, seed)
    size = min(len(spare), round(source.val_share * wanted))
    val, _ = draw_balanced(spare, size, seed + 1)
    return chosen, val if len(val) else None


def _read(
    source: ImageSource, split: str, file: str | None, train: LabelledImages | None
) -> LabelledImages | None:
    """One split, or `None` where there is no such thing."""
    if source.train_list is not None:
        if file is None:
            return None
        known = None if source.num_classes is None else tuple(map(str, range(source.num_classes)))
        return read_list(file, source.root, train.classes if train else known)
    names = VAL_FOLDERS if split == "val" else (split,)
    found = [name for name in names if (Path(source.root) / name).is_dir()]
    if not found:
        if split != "train":
            return None
        raise ValueError(_no_train_folder(Path(source.root)))
    images = read_folder(Path(source.root) / found[0], allow_empty=train is not None)
    if train is None:
        return images
    unknown = sorted(set(images.classes) - set(train.classes))
    if unknown and not source.classes:  # which leave the others aside
        raise ValueError(f"{source.root}: {found[0]}/ has a class that train/ lacks: {unknown[0]}")
    return images.restrict(train.classes, all_there=False)


def _files(images: LabelledImages) -> set[tuple[str, str]]:
    """Where each image lies, however its folder is linked, and its name."""
    named = [os.path.split(path) for path in images.paths]
    places = {folder: os.path.realpath(folder) for folder in {folder for folder, _ in named}}
    return {(places[folder], name) for folder, name in named}


def _no_train_folder(root: Path) -> str:
    if not root.is_dir():
        return f"data: no such folder: {root}"
    return f"data: {root} has no train/ folder with one folder per class (or give `train_list`)"
