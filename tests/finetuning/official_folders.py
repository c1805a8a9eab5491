"""Small data sets laid out as their authors share them, with the nesting of MATLAB's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat


def write_image(path: Path, label: int) -> str:
    """Write a photograph of 16 × 16 in the colour of a class; its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((16, 16, 3), 60, np.uint8)
    pixels[..., label % 3] = 200
    Image.fromarray(pixels).save(path)
    return path.name


def write_cub(root: Path) -> Path:
    """CUB-200-2011: three classes counted from 1; of each four images to train on, one to test."""
    species = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    lines: dict[str, list[str]] = {"images": [], "image_class_labels": [], "train_test_split": []}
    number = 0
    for label, name in enumerate(species, start=1):
        for place in range(5):
            number += 1
            path = f"{name}/{name[4:]}_{place:04}.jpg"
            write_image(root / "images" / path, label)
            lines["images"].append(f"{number} {path}")
            lines["image_class_labels"].append(f"{number} {label}")
            lines["train_test_split"].append(f"{number} {int(place != 2)}")
    lines["classes"] = [f"{label} {name}" for label, name in enumerate(species, start=1)]
    return _write_lines(root, lines)


def write_nabirds(root: Path) -> Path:
    """NABirds: classes with names of several words, of which only two have images."""
    names = {0: "Birds", 22: "Ducks", 817: "Oak Titmouse", 1010: "Verdin (Adult, 1st year)"}
    lines: dict[str, list[str]] = {"images": [], "image_class_labels": [], "train_test_split": []}
    for label in (1010, 817):
        for place in range(3):
            identifier = f"{label:08x}-21dc-4d0c-bfe1-{place:012x}"
            path = f"{label:04}/{identifier.replace('-', '')}.jpg"
            write_image(root / "images" / path, label)
            lines["images"].append(f"{identifier} {path}")
            lines["image_class_labels"].append(f"{identifier} {label}")
            lines["train_test_split"].append(f"{identifier} {int(place > 0)}")
    lines["classes"] = [f"{number} {name}" for number, name in names.items()]
    return _write_lines(root, lines)


def write_flowers(root: Path) -> Path:
    """Oxford Flowers: nine images of three classes, three of each split."""
    labels = [1, 2, 3] * 3
    for number, label in enumerate(labels, start=1):
        write_image(root / "jpg" / f"image_{number:05}.jpg", label)
    savemat(root / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    split = {"tstid": [[1, 2, 3]], "trnid": [[6, 4, 5]], "valid": [[7, 8, 9]]}
    savemat(root / "setid.mat", {name: np.array(v, np.uint16) for name, v in split.items()})
    return root


def write_dogs(root: Path, lists: str = "lists") -> Path:
    """Stanford Dogs: two breeds; of each two images to train on, one to test."""
    breeds = ["n02085620-Chihuahua", "n02085782-Japanese_spaniel"]
    (root / lists).mkdir(parents=True, exist_ok=True)
    for split, places in (("train", (0, 1)), ("test", (2,))):
        paths, labels = [], []
        for label, breed in enumerate(breeds, start=1):
            for place in places:
                paths.append(f"{breed}/{breed[:9]}_{place}.jpg")
                write_image(root / "Images" / paths[-1], label)
                labels.append(label)
        values = {
            "file_list": _cells(paths, column=True),
            "annotation_list": _cells([path[:-4] for path in paths], column=True),
            "labels": np.array(labels, np.float64)[:, None],
        }
        savemat(root / lists / f"{split}_list.mat", values)
    return root


CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012"]


def write_cars(root: Path, *, nested: bool = False) -> Path:
    """Stanford Cars with its devkit: three classes; with `nested` as Kaggle packs it."""
    kit = root / ("car_devkit/devkit" if nested else "devkit")
    kit.mkdir(parents=True)
    savemat(kit / "cars_meta.mat", {"class_names": _cells(CARS)})
    for split, file in (
        ("train", kit / "cars_train_annos.mat"),
        ("test", root / "cars_test_annos_withlabels.mat"),
    ):
        folder = root / f"cars_{split}" / (f"cars_{split}" if nested else "")
        rows = []
        for place, label in enumerate((3, 1, 2, 2, 1, 3), start=1):
            name = write_image(folder / f"{place:05}.jpg", label)
            rows.append((39, 116, 569, 375, label, name))
        fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
        savemat(file, {"annotations": _structs(rows, fields)})
    return root


def write_merged_cars(root: Path) -> Path:
    """Stanford Cars as one folder of images and one file."""
    rows = []
    for place, label in enumerate((1, 2, 3, 1, 2, 3), start=1):
        path = f"car_ims/{place:06}.jpg"
        write_image(root / path, label)
        rows.append((path, 112, 7, 853, 717, label, int(place > 3)))
    fields = ("relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test")
    values = {"annotations": _structs(rows, fields), "class_names": _cells(CARS)}
    savemat(root / "cars_annos.mat", values)
    return root


def write_vpt(root: Path, splits: dict[str, dict[str, Any]]) -> None:
    """VPT's splits: a JSON object for each."""
    for split, rows in splits.items():
        (root / f"{split}.json").write_text(json.dumps(rows))


def _write_lines(root: Path, lines: dict[str, list[str]]) -> Path:
    for name, own in lines.items():
        (root / f"{name}.txt").write_text("".join(f"{line}\n" for line in own))
    return root


def _cells(values: list[str], *, column: bool = False) -> np.ndarray:
    cells = np.empty((len(values), 1) if column else (1, len(values)), object)
    cells.flat = values
    return cells


def _structs(rows: list[tuple[Any, ...]], fields: tuple[str, ...]) -> np.ndarray:
    structs = np.empty((1, len(rows)), [(name, object) for name in fields])
    for place, row in enumerate(rows):
        structs[0, place] = tuple(
            np.array([[v]], np.uint16) if isinstance(v, int) else np.array([v]) for v in row
        )
    return structs
