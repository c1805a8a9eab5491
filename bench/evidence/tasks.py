"""Seven tasks of the three kinds of VTAB-1k, made of photographs: folders of images by class.

`python -m bench.evidence.tasks --data FOLDER --tasks FOLDER` writes them. The same seed writes the
same pixels. The photographs are not in this repository: `cifar10.tar.gz` and `flowers12.tar.gz`,
whose layout `SOURCES` tells.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import secrets
import shutil
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SEED = 20260701
DATA_VARIABLE = "SPT_EVIDENCE_DATA"
DATA = Path(__file__).parents[3] / "shared" / "data"  # beside the repository

SOURCES = {
    "cifar10.tar.gz": "CIFAR-10 as cifar10/{train,test}/<class>/*.jpg",
    "flowers12.tar.gz": "twelve of the Oxford flowers as flowers12/{train,test}/<species>/*.jpg",
}
NEW_CLASSES = ("frog", "horse", "ship", "truck")  # those that the ViT was not pre-trained on

MADE = "tasks.json"  # written last: what the folder was made of

SIDE = 24  # pixels of the middle of a photograph of 32: little more than half the work
_NOISE = 25.0  # standard deviation, of 255
_BLUR = 1.2  # pixels
_PATCH = 6  # pixels of a side
_SHAPE = 5
_CONTRAST = 110  # least distance of a shape's colour from what is under it, summed over channels

Change = Callable[[Image.Image, int, random.Random], Image.Image]
Photographs = dict[str, list[bytes]]  # class -> files


@dataclass(frozen=True)
class Counts:
    """Images of each class in each split."""

    train: int = 200
    val: int = 50
    test: int = 250


@dataclass(frozen=True)
class PhotoTask:
    """A task on CIFAR-10's photographs of the new classes.

    Attributes:
        name: of its folder.
        group: Natural, Specialized or Structured.
        labels: names of its classes.
        change: image, number of its label, dice -> the image of the task.
        is_of_objects: whether the label is what the photograph shows; else every label is made
            of photographs of all the new classes alike.
    """

    name: str
    group: str
    labels: tuple[str, ...]
    change: Change
    is_of_objects: bool


def as_it_is(image: Image.Image, label: int, dice: random.Random) -> Image.Image:
    """The photograph."""
    return image


def recoloured(image: Image.Image, label: int, dice: random.Random) -> Image.Image:
    """Its hue turned by a third of the circle, as a negative, with noise."""
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(h + 85) % 256 for h in range(256)])
    turned = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    noise = np.random.default_rng(dice.getrandbits(64)).normal(0, _NOISE, (*image.size, 3))
    pixels = 255 - np.asarray(turned, dtype=np.float64) + noise
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def blurred(image: Image.Image, label: int, dice: random.Random) -> Image.Image:
    """As an instrument out of focus sees it: grey and without its small parts."""
    return image.convert("L").filter(ImageFilter.GaussianBlur(_BLUR)).convert("RGB")


def rotated(image: Image.Image, label: int, dice: random.Random) -> Image.Image:
    """Turned by as many quarters as its label says."""
    return image.rotate(90 * label)


def patched(image: Image.Image, label: int, dice: random.Random) -> Image.Image:
    """A piece of itself, as a negative, in the quadrant that its label says, anywhere within it."""
    made, half = image.copy(), image.width // 2
    x, y = (dice.randint(0, image.width - _PATCH) for _ in "xy")
    piece = image.crop((x, y, x + _PATCH, y + _PATCH)).point([255 - v for v in range(256)] * 3)
    left, top = (part * half + dice.randint(0, half - _PATCH) for part in (label % 2, label // 2))
    made.paste(piece, (left, top))
    return made


def counted(image: Image.Image, label: int, dice: random.Random) -> Image.Image:
    """With as many shapes as its label says, and one, that do not touch each other."""
    made = image.copy()
    draw = ImageDraw.Draw(made)
    places: list[tuple[int, int]] = []
    while len(places) <= label:
        x, y = (dice.randint(0, image.width - _SHAPE) for _ in "xy")
        if all(max(abs(x - a), abs(y - b)) > _SHAPE for a, b in places):
            places.append((x, y))
    for x, y in places:
        under = image.getpixel((x + _SHAPE // 2, y + _SHAPE // 2))
        colour = _unlike(under, dice)
        box = (x, y, x + _SHAPE - 1, y + _SHAPE - 1)
        kind = dice.randrange(3)
        if kind == 0:
            draw.rectangle(box, colour)
        elif kind == 1:
            draw.ellipse(box, colour)
        else:
            draw.polygon([(x, box[3]), (box[2], box[3]), (x + _SHAPE // 2, y)], colour)
    return made


def _unlike(under: object, dice: random.Random) -> tuple[int, int, int]:
    """A colour that is seen on `under`."""
    while True:
        colour = (dice.randrange(256), dice.randrange(256), dice.randrange(256))
        if sum(abs(a - b) for a, b in zip(colour, under, strict=True)) >= _CONTRAST:  # type: ignore[call-overload]
            return colour


PHOTO_TASKS = (
    PhotoTask("four-classes", "Natural", NEW_CLASSES, as_it_is, True),
    PhotoTask("recoloured", "Specialized", NEW_CLASSES, recoloured, True),
    PhotoTask("blurred", "Specialized", NEW_CLASSES, blurred, True),
    PhotoTask("rotation", "Structured", ("000", "090", "180", "270"), rotated, False),
    PhotoTask(
        "quadrant",
        "Structured",
        ("1-upper-left", "2-upper-right", "3-lower-left", "4-lower-right"),
        patched,
        False,
    ),
    PhotoTask("counting", "Structured", ("1", "2", "3", "4"), counted, False),
)
FLOWERS = "flowers"
FLOWERS_VAL = 12  # of the sixty photographs of each species to train on

GROUPS = {FLOWERS: "Natural", **{task.name: task.group for task in PHOTO_TASKS}}


def write_tasks(data: Path, tasks: Path, counts: Counts | None = None, seed: int = SEED) -> None:
    """Write every task below `tasks`, as `<group>/<task>/{train,val,test}/<class>/`.

    A folder that holds what it would write is left alone.

    Args:
        data: the folder of the archives.
        tasks: a folder that is not there, or that this made.
        counts: images of each class; the flowers are as many as there are.
        seed: of everything drawn.

    Raises:
        ValueError: an archive is missing or is of another layout, or `tasks` holds other things.
    """
    counts = counts or Counts()
    made_of = {
        "seed": seed,
        "side": SIDE,
        "counts": asdict(counts),
        "tasks": [t.name for t in PHOTO_TASKS],
    }
    if (tasks / MADE).is_file() and json.loads((tasks / MADE).read_text()) == made_of:
        return
    if tasks.exists():
        raise ValueError(f"tasks: {tasks} is there and holds other things; name another folder")
    for name, layout in SOURCES.items():
        if not (data / name).is_file():
            raise ValueError(
                f"data: {data} has no {name} ({layout}); name its folder with --data or in "
                f"{DATA_VARIABLE}"
            )
    partial = tasks.with_name(f".{tasks.name}.{secrets.token_hex(4)}")
    try:
        photographs = {
            split: _photographs(data / "cifar10.tar.gz", f"cifar10/{split}", NEW_CLASSES)
            for split in ("train", "test")
        }
        for task in PHOTO_TASKS:
            write_photo_task(task, photographs, partial / task.group / task.name, counts, seed)
        _write_flowers(data / "flowers12.tar.gz", partial / "Natural" / FLOWERS, seed)
        (partial / MADE).write_text(json.dumps(made_of, indent=2) + "\n")
        os.replace(partial, tasks)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_photo_task(
    task: PhotoTask, photographs: dict[str, Photographs], folder: Path, counts: Counts, seed: int
) -> None:
    """Write one task; no photograph is in two of its splits or twice in one.

    Args:
        task: which.
        photographs: `train` and `test`, each with the files of every new class.
        folder: of the task.
        counts: images of each label.
        seed: of everything drawn.

    Raises:
        ValueError: there are fewer photographs than that.
    """
    dice = random.Random(f"{seed} {task.name}")
    for split, parts in (("train", ("train", "val")), ("test", ("test",))):
        sizes = [getattr(counts, part) for part in parts]
        drawn = _drawn(task, photographs[split], sum(sizes), dice)
        for label, name in enumerate(task.labels):
            files = iter(drawn[label])
            for part, size in zip(parts, sizes, strict=True):
                place = folder / part / name
                place.mkdir(parents=True)
                for number in range(size):
                    image = _middle(Image.open(io.BytesIO(next(files))).convert("RGB"))
                    task.change(image, label, dice).save(place / f"{number:04}.png")


def _middle(image: Image.Image) -> Image.Image:
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    return image.crop((left, top, left + SIDE, top + SIDE))


def _drawn(
    task: PhotoTask, photographs: Photographs, count: int, dice: random.Random
) -> list[list[bytes]]:
    """`count` photographs for each label, of one class or of all alike."""
    shuffled = {name: dice.sample(files, len(files)) for name, files in photographs.items()}
    if task.is_of_objects:
        drawn = [shuffled[label][:count] for label in task.labels]
    else:
        mixed = [file for row in zip(*shuffled.values(), strict=False) for file in row]
        # four in turn are of the four classes: whole rounds give each label as many of each
        n = len(task.labels)
        rounds = [mixed[start : start + n] for start in range(0, count * n, n)]
        turned = [row[turn % n :] + row[: turn % n] for turn, row in enumerate(rounds)]
        drawn = [[row[label] for row in turned if len(row) == n] for label in range(n)]
    if short := [label for label, files in enumerate(drawn) if len(files) < count]:
        have = len(drawn[short[0]])
        raise ValueError(f"data: {task.name} needs {count} photographs of a class, has {have}")
    return drawn


def _write_flowers(archive: Path, folder: Path, seed: int) -> None:
    """The flowers as they are, the last of each species to train on held out for validation."""
    train = _photographs(archive, "flowers12/train")
    test = _photographs(archive, "flowers12/test")
    dice = random.Random(f"{seed} {FLOWERS}")
    for species, files in train.items():
        mixed = dice.sample(files, len(files))
        parts = {"train": mixed[:-FLOWERS_VAL], "val": mixed[-FLOWERS_VAL:], "test": test[species]}
        for part, own in parts.items():
            place = folder / part / species
            place.mkdir(parents=True)
            for number, file in enumerate(own):
                (place / f"{number:04}.jpg").write_bytes(file)


def _photographs(archive: Path, folder: str, classes: Iterable[str] = ()) -> Photographs:
    """The files in an archive's folder by class, in the order of their names."""
    found: dict[str, dict[str, bytes]] = {}
    wanted = frozenset(classes)
    with tarfile.open(archive) as files:
        for member in files:
            path = PurePosixPath(member.name)
            is_one = member.isfile() and path.suffix == ".jpg" and path.parents[1].as_posix()
            if is_one != folder or (wanted and path.parent.name not in wanted):
                continue
            content = files.extractfile(member)
            assert content is not None
            found.setdefault(path.parent.name, {})[path.name] = content.read()
    if not found or wanted - found.keys():
        what = ", ".join(sorted(wanted - found.keys())) or "any class"
        raise ValueError(f"data: {archive} has no {folder}/ with {what}")
    return {name: [own[file] for file in sorted(own)] for name, own in sorted(found.items())}


def data_folder() -> Path:
    """Where the photographs are, unless a command says otherwise."""
    return Path(os.environ.get(DATA_VARIABLE, DATA))


def main() -> None:
    """Write the tasks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=data_folder(), help="the archives' folder")
    parser.add_argument("--tasks", type=Path, required=True, help="the folder to write")
    given = parser.parse_args()
    write_tasks(given.data, given.tasks)


if __name__ == "__main__":
    main()
