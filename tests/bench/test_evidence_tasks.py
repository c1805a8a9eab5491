"""The tasks of the evidence are what their labels say, and no photograph is in two splits."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from bench.evidence import tasks
from bench.evidence.tasks import (
    GROUPS,
    NEW_CLASSES,
    PHOTO_TASKS,
    SIDE,
    Counts,
    Photographs,
    write_photo_task,
    write_tasks,
)
from spt_kernels.benchmarks import folder_tasks

COUNTS = Counts(train=4, val=2, test=3)
QUADRANTS = {  # of the names: rows, columns
    "1-upper-left": (0, 0),
    "2-upper-right": (0, 1),
    "3-lower-left": (1, 0),
    "4-lower-right": (1, 1),
}


def photograph(number: int) -> bytes:
    """Smooth, and unlike any other."""
    dice = np.random.default_rng(number)
    small = Image.fromarray(dice.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((32, 32), Image.Resampling.BILINEAR).save(file, "PNG")
    return file.getvalue()


def photographs(first: int, count: int) -> Photographs:
    return {
        name: [photograph(first + 1000 * place + n) for n in range(count)]
        for place, name in enumerate(NEW_CLASSES)
    }


BOTH = {"train": photographs(0, 8), "test": photographs(500, 5)}


def middle(file: bytes) -> np.ndarray:
    edge = (32 - SIDE) // 2
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))[edge:-edge, edge:-edge]


ORIGINALS = {
    (split, name): [middle(file) for file in files]
    for split, own in BOTH.items()
    for name, files in own.items()
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for task in PHOTO_TASKS:
        write_photo_task(task, BOTH, folder / task.group / task.name, COUNTS, seed=3)
    return folder


def images(root: Path, task: str) -> dict[tuple[str, str], list[np.ndarray]]:
    """(split, label) -> pixels."""
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    for file in sorted((root / GROUPS[task] / task).glob("*/*/*.png")):
        found.setdefault((file.parts[-3], file.parts[-2]), []).append(np.asarray(Image.open(file)))
    return found


def nearest(image: np.ndarray, split: str) -> np.ndarray:
    """The photograph that an image was made of, by the pixels that are as they were."""
    every = [
        o for (s, _), own in ORIGINALS.items() for o in own if (s == "test") == (split == "test")
    ]
    return max(every, key=lambda original: (original == image).all(-1).sum())


def test_splits_have_their_counts_and_share_no_photograph(root: Path) -> None:
    found = images(root, "four-classes")
    assert {key: len(own) for key, own in found.items()} == {
        (split, name): getattr(COUNTS, split)
        for split in ("train", "val", "test")
        for name in NEW_CLASSES
    }
    flat = [image.tobytes() for own in found.values() for image in own]
    assert len(set(flat)) == len(flat)
    for (split, name), own in found.items():
        source = [o.tobytes() for o in ORIGINALS["test" if split == "test" else "train", name]]
        assert all(image.tobytes() in source for image in own)


def test_a_rotation_turned_back_is_a_photograph(root: Path) -> None:
    for (split, label), own in images(root, "rotation").items():
        source = {
            o.tobytes()
            for (s, _), every in ORIGINALS.items()
            if (s == "test") == (split == "test")
            for o in every
        }
        for image in own:
            assert np.rot90(image, -int(label) // 90).tobytes() in source


def test_a_patch_lies_in_its_quadrant(root: Path) -> None:
    half = SIDE // 2
    for (split, label), own in images(root, "quadrant").items():
        row, column = QUADRANTS[label]
        for image in own:
            changed = (image != nearest(image, split)).any(-1)
            inside = changed[row * half : (row + 1) * half, column * half : (column + 1) * half]
            assert changed.sum() == inside.sum() > 0


def test_as_many_shapes_as_the_label_says(root: Path) -> None:
    for (split, label), own in images(root, "counting").items():
        for image in own:
            changed = (image != nearest(image, split)).any(-1)
            assert ndimage.label(changed)[1] == int(label)


def test_structured_labels_say_nothing_of_the_class(root: Path) -> None:
    # each label has as many photographs of each class: four of train, one of each
    for (split, _), own in images(root, "rotation").items():
        if split == "train":
            turned = [np.rot90(image, k).tobytes() for image in own for k in range(4)]
            for name in NEW_CLASSES:
                assert sum(o.tobytes() in turned for o in ORIGINALS["train", name]) == 1


def test_the_same_seed_gives_the_same_pixels(root: Path, tmp_path: Path) -> None:
    for task in PHOTO_TASKS:
        for seed in (3, 4):
            write_photo_task(task, BOTH, tmp_path / f"{task.name}{seed}", COUNTS, seed)

        def pixels(folder: Path) -> list[bytes]:
            return [f.read_bytes() for f in sorted(folder.glob("*/*/*.png"))]

        first = pixels(root / task.group / task.name)
        assert pixels(tmp_path / f"{task.name}3") == first
        assert pixels(tmp_path / f"{task.name}4") != first


def test_specialized_images_are_recoloured_or_grey() -> None:
    image = Image.open(io.BytesIO(photograph(1))).convert("RGB")
    recoloured = np.asarray(tasks.recoloured(image, 0, random.Random(0)), dtype=float)
    # the hue is turned and the negative taken: brightness runs the other way
    light = np.asarray(image, dtype=float).max(-1).ravel()
    assert np.corrcoef(light, recoloured.min(-1).ravel())[0, 1] < -0.5
    blurred = np.asarray(tasks.blurred(image, 0, random.Random(0)))
    assert (blurred[..., 0] == blurred[..., 1]).all()
    assert (blurred[..., 1] == blurred[..., 2]).all()


def test_too_few_photographs_are_an_error(tmp_path: Path) -> None:
    few = {"train": photographs(0, 3), "test": photographs(500, 5)}
    for task in PHOTO_TASKS:
        with pytest.raises(ValueError, match=f"data: {task.name} needs 6 photographs"):
            write_photo_task(task, few, tmp_path / task.name, COUNTS, seed=3)


def archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as made:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))


def test_archives_become_tasks_of_a_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "FLOWERS_VAL", 1)
    data, made = tmp_path / "data", tmp_path / "tasks"
    data.mkdir()
    with pytest.raises(ValueError, match=r"has no cifar10.tar.gz .*SPT_EVIDENCE_DATA"):
        write_tasks(data, made, COUNTS)
    archive(
        data / "cifar10.tar.gz",
        {
            f"cifar10/{split}/{name}/{n:04}.jpg": file
            for split, own in BOTH.items()
            for name, files in own.items()
            for n, file in enumerate(files)
        },
    )
    with pytest.raises(ValueError, match=r"has no flowers12.tar.gz"):
        write_tasks(data, made, COUNTS)
    assert not made.exists()
    flowers = {
        f"flowers12/{split}/{species}/image_{n}.jpg": photograph(n)
        for split, count in (("train", 3), ("test", 2))
        for species in ("daisy", "iris")
        for n in range(count)
    }
    archive(data / "flowers12.tar.gz", {"flowers12/README.txt": b"", **flowers})
    write_tasks(data, made, COUNTS)
    assert {task.name: task.group for task in folder_tasks(made)} == GROUPS
    assert len(list((made / "Natural" / "flowers").glob("train/*/*.jpg"))) == 4
    assert len(list((made / "Natural" / "flowers").glob("val/*/*.jpg"))) == 2
    write_tasks(tmp_path / "no such folder", made, COUNTS)  # all is there: nothing is read
    with pytest.raises(ValueError, match=r"tasks: .* holds other things"):
        write_tasks(data, made, COUNTS, seed=8)
    assert not list(tmp_path.glob(".tasks*"))
