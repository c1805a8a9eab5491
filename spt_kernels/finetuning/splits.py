"""The training, validation and test images of one task."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .images import LabelledImages, draw_balanced, draw_proportional, read_folder, read_list

VAL_FOLDERS = ("val", "valid", "validation")


@dataclass(frozen=True)
class ImageSource:
    """Where the images of a task are.

    Attributes:
        root: a folder with `train/`, and optionally `val/` and `test/`, each with a folder per
            class; or the folder that the paths in the lists start from.
        train_list: a list of `path label` lines, in place of `train/`.
        val_list: likewise.
        test_list: likewise.
        classes: use these alone, in this order; empty for all.
        train_images: train on so many, the same number of each class; `None` for all.
        val_share: where there are no validation images, hold out this share of the training images;
            with `train_images`, take that share of them from those not drawn. 0 for none.
    """

    root: str
    train_list: str | None = None
    val_list: str | None = None
    test_list: str | None = None
    classes: tuple[str, ...] = ()
    train_images: int | None = None
    val_share: float = 0.1

    def __post_init__(self) -> None:
        if self.train_images is not None and self.train_images < 1:
            raise ValueError(f"train_images: expected more than zero, got {self.train_images}")
        if not 0 <= self.val_share < 1:
            raise ValueError(f"val_share: expected at least 0 and below 1, got {self.val_share}")
        if self.train_list is None and (self.val_list or self.test_list):
            raise ValueError("train_list: a validation or test list needs a training list")


@dataclass(frozen=True)
class Splits:
    """The images of a task; what is absent is `None`. Nothing is ever chosen by the test images."""

    train: LabelledImages
    val: LabelledImages | None
    test: LabelledImages | None


def read_splits(source: ImageSource, seed: int = 0) -> Splits:
    """Find, restrict and draw the images of `source`; the same `seed` draws the same ones.

    Raises:
        ValueError: a folder or list is missing, malformed or empty, or fewer than two classes.
    """
    train = _read(source, "train", source.train_list, None)
    assert train is not None
    val = _read(source, "val", source.val_list, train)
    test = _read(source, "test", source.test_list, train)
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
    if val is None and source.val_share > 0:
        train, val = _hold_out(train, source, seed)
    elif source.train_images is not None:
        train, _ = draw_balanced(train, source.train_images, seed)
    return Splits(train, val, test)


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


def _hold_out(
    train: LabelledImages, source: ImageSource, seed: int
) -> tuple[LabelledImages, LabelledImages | None]:
    wanted = source.train_images
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
        return read_list(file, source.root, train.classes if train else None)
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


def _no_train_folder(root: Path) -> str:
    if not root.is_dir():
        return f"data: no such folder: {root}"
    return f"data: {root} has no train/ folder with one folder per class (or give a train_list)"
