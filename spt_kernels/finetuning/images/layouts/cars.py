"""Stanford Cars: the devkit's annotations of two folders, or one file for all images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .listing import Listing, first_there, numbered
from .mat_file import read_mat

_KITS = ("devkit", "car_devkit/devkit", ".")  # the second as Kaggle packs it
# the devkit's own list of test images tells no classes; this one came later, beside the devkit
_WITH_LABELS = ("cars_test_annos_withlabels.mat", "cars_test_annos_withlabels (1).mat")
SIGNS = (*(f"{kit}/cars_train_annos.mat" for kit in _KITS), "cars_annos.mat", *_WITH_LABELS)


def read(root: Path) -> Listing:
    """Read `cars_train_annos.mat` and `cars_test_annos_withlabels.mat`, or else `cars_annos.mat`.

    With the former the images are in `cars_train/` and `cars_test/`, or, as Kaggle packs them,
    `cars_train/cars_train/` and so on; with the latter where it says, in `car_ims/`.

    Raises:
        ValueError: a file is missing or malformed.
    """
    whole = root / "cars_annos.mat"
    if whole.is_file() and (root / "car_ims").is_dir():
        annotations, names = read_mat(whole, "annotations", "class_names")
        rows: dict[str, list[tuple[Path, int]]] = {"train": [], "test": []}
        for path, label, is_test in _columns(
            whole, annotations, "relative_im_path", "class", "test"
        ):
            rows["test" if is_test else "train"].append((root / str(path), int(label)))
        return numbered(rows, _names(names))
    rows = {}
    for split, files in (("train", ("cars_train_annos.mat",)), ("test", _WITH_LABELS)):
        file = first_there(root, [f"{kit}/{name}" for name in files for kit in _KITS])
        folder = first_there(root, [f"cars_{split}/cars_{split}", f"cars_{split}"])
        (annotations,) = read_mat(file, "annotations")
        rows[split] = [
            (folder / str(name), int(label))
            for name, label in _columns(file, annotations, "fname", "class")
        ]
    meta = first_there(root, [f"{kit}/cars_meta.mat" for kit in _KITS])
    return numbered(rows, _names(read_mat(meta, "class_names")[0]))


def _columns(file: Path, annotations: Any, *fields: str) -> zip[tuple[Any, ...]]:
    known = annotations.dtype.names or ()
    if lacking := [name for name in fields if name not in known]:
        raise ValueError(
            f"{file}: expected annotations with {lacking[0]}, found {', '.join(known) or 'none'}"
        )
    return zip(*(annotations[name] for name in fields), strict=True)


def _names(class_names: Any) -> dict[int, str]:
    return {number: str(name) for number, name in enumerate(class_names, start=1)}
