"""Images as tensors: values, sizes, order, augmentation, damaged files."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from spt_kernels.finetuning.images.labelled import LabelledImages, read_folder
from spt_kernels.finetuning.images.pixels import Batches, PixelSet, Preprocessing, decode

from .pictures_on_disk import write_images

HALF = (0.5, 0.5, 0.5)
CPU = torch.device("cpu")


def form(**changes: object) -> Preprocessing:
    return Preprocessing(**{"size": 8, "mean": HALF, "std": HALF, **changes})  # type: ignore[arg-type]


def test_pixels_and_normalisation_are_those_of_numpy(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    shape = form(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    ((images, labels),) = Batches(PixelSet(read_folder(tmp_path), shape), 4, CPU)
    expected = (pixels / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.4, 0.5, 0.6])
    np.testing.assert_allclose(images[0].permute(1, 2, 0).numpy(), expected, atol=1e-6)
    assert labels.tolist() == [0]


def test_squash_keeps_everything_and_crop_keeps_the_middle(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    squashed = decode(tmp_path / "wide.png", form(interpolation="nearest"))
    cropped = decode(tmp_path / "wide.png", form(fit="crop", interpolation="nearest"))
    assert squashed.shape == cropped.shape == (3, 8, 8)
    assert cropped.min() == 255
    assert squashed[:, :, 0].max() == 0


def test_grey_images_have_one_channel_and_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    seen = decode(tmp_path / "turned.png", form(mean=(0.5,), std=(0.5,)))
    assert torch.equal(seen[0], torch.from_numpy(np.rot90(np.asarray(image), -1).copy()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_with_odd_metadata_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    image = Image.fromarray(np.arange(32, dtype=np.uint8).reshape(4, 8))
    tags = ((0x0112, 3, 1, struct.pack("<HH", orientation, 0)), (0x0100, 2, 4, b"odd"))
    rows = b"".join(struct.pack("<HHI4s", *tag) for tag in tags)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + rows + bytes(4)
    image.save(tmp_path / "odd.png", exif=exif)
    plain = Image.Exif()
    plain[0x0112] = orientation
    image.save(tmp_path / "plain.png", exif=plain)
    with Image.open(tmp_path / "plain.png") as file:
        expected = np.asarray(ImageOps.exif_transpose(file).resize((8, 8), Image.NEAREST))
    own = form(mean=(0.5,), std=(0.5,), interpolation="nearest")
    assert torch.equal(decode(tmp_path / "odd.png", own)[0], torch.from_numpy(expected.copy()))


ODD = b"DDS " + struct.pack("<I", 124) + bytes(120)  # Pillow has a RuntimeError for it


def damaged_spider() -> bytes:
    """An image of a stack that there is none of, for which Pillow has an AttributeError."""
    file = io.BytesIO()
    Image.new("F", (4, 4)).save(file, "SPIDER")
    values = bytearray(file.getvalue())
    values[104:108] = struct.pack("f", 1.0)
    return bytes(values)


@pytest.mark.parametrize(
    "content",
    [b"", b"no image at all", None, ODD, damaged_spider()],
    ids=["empty", "text", "cut", "odd", "spider"],
)
def test_a_damaged_image_is_named(tmp_path: Path, content: bytes | None) -> None:
    write_images(tmp_path, {"a": 2}, size=(64, 64))
    bad = tmp_path / "a" / "001.png"
    bad.write_bytes(bad.read_bytes()[:3000] if content is None else content)
    with pytest.raises(ValueError, match=r"001\.png: cannot read the image"):
        PixelSet(read_folder(tmp_path), form()).preload()


def test_each_epoch_has_its_own_order_given_by_the_seed(tmp_path: Path) -> None:
    images = LabelledImages(tuple(Path(f"{i}") for i in range(20)), tuple(range(20)), ("x",))
    batches = Batches(PixelSet(images, form()), 4, CPU, shuffle_seed=1)
    assert sorted(batches.order(0)) == list(range(20))
    assert batches.order(0) != batches.order(1)
    assert batches.order(3) == Batches(PixelSet(images, form()), 4, CPU, shuffle_seed=1).order(3)
    assert batches.order(0) != Batches(PixelSet(images, form()), 4, CPU, shuffle_seed=2).order(0)
    assert Batches(PixelSet(images, form()), 4, CPU).order(5) == list(range(20))


def test_the_order_of_a_pass_is_that_of_its_labels(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 3, "b": 3, "c": 3})
    pixels = PixelSet(read_folder(tmp_path), form()).preload()
    batches = Batches(pixels, 4, CPU, shuffle_seed=0)
    seen = torch.cat([labels for _, labels in batches.epoch(2)])
    assert seen.tolist() == [int(pixels.labels[i]) for i in batches.order(2)]
    assert len(batches) == 3


def test_neither_workers_nor_memory_change_what_comes(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 3, "b": 3})
    for augment in ("none", "resized-crop-flip"):
        shape = form(augment=augment)
        passes = []
        for workers, loaded in ((0, False), (2, False), (0, True)):
            pixels = PixelSet(read_folder(tmp_path), shape, seed=5)
            pixels = pixels.preload() if loaded else pixels
            batches = Batches(pixels, 4, CPU, shuffle_seed=0, workers=workers)
            passes.append(torch.cat([images for images, _ in batches.epoch(1)]))
        assert torch.equal(passes[0], passes[1])
        assert torch.equal(passes[0], passes[2])


def test_a_seed_may_be_a_date(tmp_path: Path) -> None:
    """Times the numbers of the epoch and the image it is more than 64 bits have room for."""
    write_images(tmp_path, {"a": 4})
    passes = []
    for seed in (20261129, 20261130, 2**63 - 1):
        pixels = PixelSet(read_folder(tmp_path), form(augment="crop-flip"), seed=seed)
        batches = Batches(pixels, 4, CPU, shuffle_seed=seed)
        (images, _), (again, _) = (next(batches.epoch(1)) for _ in range(2))
        assert torch.equal(images, again)
        passes.append(images)
    assert not torch.equal(passes[0], passes[1])


def test_augmentation_changes_with_the_epoch_alone(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 4})
    pixels = PixelSet(read_folder(tmp_path), form(augment="crop-flip"))
    batches = Batches(pixels, 4, CPU)
    first, again, other = (torch.cat([i for i, _ in batches.epoch(n)]) for n in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_loading_does_not_touch_the_generators(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 4})
    batches = Batches(PixelSet(read_folder(tmp_path), form()), 2, CPU, shuffle_seed=0)
    before = torch.get_rng_state()
    list(batches.epoch(0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0},
        {"crop_pct": 0.0},
        {"crop_pct": 1.1},
        {"std": (0.5, 0.0, 0.5)},
        {"std": (0.5, float("inf"), 0.5)},
        {"mean": (0.5, float("nan"), 0.5)},
        {"mean": (0.5,)},
        {"fit": "x"},
        {"augment": "x"},
    ],
    ids=str,
)
def test_impossible_preprocessing_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change)).replace("size", "image_size")):
        form(**change)
