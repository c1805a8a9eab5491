"""The one list of data sets whose own files are read, and their images."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ....methods.method import check_one_of
from ..labelled import LabelledImages
from . import birds, cars, dogs, flowers, vpt
from .listing import Listing

_SHOWN = 6  # entries of a folder


@dataclass(frozen=True)
class Layout:
    """How a data set is laid out.

    Attributes:
        title: what it is called in tables.
        num_classes: how many it has.
        folder: of the images, where the paths of VPT's splits begin if not at the root.
        own: reads the files that its authors wrote.
        signs: such files, any of which tells that a folder is laid out so.
    """

    title: str
    num_classes: int
    folder: str
    own: Callable[[Path], Listing]
    signs: tuple[str, ...]

    def is_in(self, root: Path) -> bool:
        """Whether a folder is laid out so."""
        return any((root / sign).is_file() for sign in self.signs)

    def listing(self, root: str | os.PathLike[str]) -> Listing:
        """What its files list, VPT's splits where they are there; no image is looked for.

        Raises:
            ValueError: the folder is laid out otherwise, and how; or a file is missing or
                malformed, or lists more classes than there are.
        """
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"data: no such folder: {root}")
        has_splits = vpt.is_there(root)
        if not (has_splits or self.is_in(root)):
            raise ValueError(_told_otherwise(self, root))
        found = vpt.read(root, self.folder) if has_splits else self.own(root)
        for split in ("train", "test"):
            if not getattr(found, split):
                raise ValueError(f"{root}: lists no {split} images")
        if len(found.classes) > self.num_classes:
            raise ValueError(
                f"{root}: {self.title} has {self.num_classes} classes, its files list "
                f"{len(found.classes)}"
            )
        return found


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "cub-200-2011": Layout("CUB-200-2011", 200, "images", birds.read, birds.SIGNS),
        "nabirds": Layout("NABirds", 555, "images", birds.read, birds.SIGNS),
        "oxford-flowers": Layout("Oxford Flowers", 102, "jpg", flowers.read, flowers.SIGNS),
        "stanford-dogs": Layout("Stanford Dogs", 120, "Images", dogs.read, dogs.SIGNS),
        "stanford-cars": Layout("Stanford Cars", 196, ".", cars.read, cars.SIGNS),
    }
)


def layout_of(name: str) -> Layout:
    """The layout called `name`.

    Raises:
        ValueError: there is none.
    """
    check_one_of("layout", name, LAYOUTS)
    return LAYOUTS[name]


def read_layout(
    name: str, root: str | os.PathLike[str]
) -> tuple[LabelledImages, LabelledImages | None, LabelledImages]:
    """The training, validation and test images of the data set `name` in the folder `root`.

    Where neither the data set nor VPT's files tell validation images, these are `None`.

    Raises:
        ValueError: as `Layout.listing`, or an image is not there.
    """
    listing = layout_of(name).listing(root)
    val = None if listing.val is None else _images(listing.val, listing.classes)
    return _images(listing.train, listing.classes), val, _images(listing.test, listing.classes)


def _told_otherwise(wanted: Layout, root: Path) -> str:
    """What was expected in a folder, what is there, and what would fit."""
    inside = sorted(root.iterdir())
    shown = [f"{path.name}/" if path.is_dir() else path.name for path in inside]
    found = ", ".join([*shown[:_SHOWN], *["…"] * (len(shown) > _SHOWN)]) or "nothing"
    text = f"data: expected {wanted.title} in {root}, with {wanted.signs[0]}, found {found}"
    if fitting := [name for name, own in LAYOUTS.items() if own.is_in(root)]:
        return f"{text}; that is the `layout` {' or '.join(fitting)}"
    if below := next((path for path in inside if path.is_dir() and wanted.is_in(path)), None):
        return f"{text}; name the folder {below}"
    if (root / "train").is_dir():
        return f"{text}; without `layout`, the folders in train/ are the classes"
    return text


def _images(rows: Sequence[tuple[Path, int]], classes: tuple[str, ...]) -> LabelledImages:
    lacking = [path for path, _ in rows if not path.is_file()]
    if lacking:
        others = f" (and {len(lacking) - 1} more of {len(rows)})" if len(lacking) > 1 else ""
        raise ValueError(f"{lacking[0]}: no such file{others}, though the data set lists it")
    return LabelledImages(tuple(p for p, _ in rows), tuple(n for _, n in rows), classes)
