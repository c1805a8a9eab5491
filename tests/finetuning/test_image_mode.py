"""Images of every mode in eight bits: the same picture, or refused by file and mode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spt_kernels.finetuning.images.pixels import Preprocessing, decode

GREY = Preprocessing(size=16, mean=(0.5,), std=(0.5,), interpolation="nearest")
COLOUR = Preprocessing(size=16, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="nearest")
RAMP = np.tile(np.linspace(0, 1, 16), (16, 1))
EIGHT = np.rint(RAMP * 255).astype(np.uint8)


def seen(path: Path, form: Preprocessing = GREY) -> np.ndarray:
    return decode(path, form)[0].numpy()


@pytest.mark.parametrize("form", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("8.png", EIGHT),
        ("16.png", np.rint(RAMP * 65535).astype(np.uint16)),
        ("16.tif", np.rint(RAMP * 65535).astype(np.uint16)),
        ("16.pgm", np.rint(RAMP * 65535).astype(np.uint16)),
        ("big-endian.tif", np.rint(RAMP * 65535).astype(">u2")),
        ("float.tif", RAMP.astype(np.float32)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_picture_is_the_same_in_any_depth(
    tmp_path: Path, name: str, pixels: np.ndarray, form: Preprocessing
) -> None:
    Image.fromarray(pixels).save(tmp_path / name)
    tensor = decode(tmp_path / name, form)
    for channel in tensor:
        np.testing.assert_allclose(channel.numpy().astype(int), EIGHT, atol=1)
    assert tensor.min() == 0
    assert tensor.max() == 255


def test_a_bitmap_and_a_palette_keep_their_colours(tmp_path: Path) -> None:
    half = EIGHT > 127
    Image.fromarray(half).save(tmp_path / "bits.png")
    assert np.array_equal(seen(tmp_path / "bits.png"), half * 255)
    colours = np.stack([EIGHT // 32 * 32, 255 - EIGHT // 32 * 32, EIGHT * 0], -1)
    palette = Image.fromarray(colours).quantize(16)
    palette.save(tmp_path / "palette.png")
    got = decode(tmp_path / "palette.png", COLOUR).permute(1, 2, 0).numpy()
    assert np.array_equal(got, np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("mode", ["LA", "RGBA", "CMYK"])
def test_transparency_and_ink_are_as_pillow_takes_them(tmp_path: Path, mode: str) -> None:
    image = (
        Image.fromarray(EIGHT).convert("RGB").convert(mode)
        if mode == "CMYK"
        else (Image.fromarray(EIGHT).convert(mode))
    )
    image.save(tmp_path / "x.tif")
    np.testing.assert_allclose(seen(tmp_path / "x.tif").astype(int), EIGHT, atol=1)


def test_sixteen_bits_of_which_twelve_are_used_are_scaled_by_twelve(tmp_path: Path) -> None:
    values = np.rint(RAMP * 4095).astype(np.uint16)
    pairs = values.reshape(-1, 2).astype(np.uint32)  # two values in three bytes
    packed = np.stack(
        [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1
    ).astype(np.uint8)
    (tmp_path / "12.tif").write_bytes(tiff(packed.tobytes(), bits=12))
    np.testing.assert_allclose(seen(tmp_path / "12.tif").astype(int), EIGHT, atol=1)


def test_where_zero_is_white_it_stays_white(tmp_path: Path) -> None:
    values = np.rint(RAMP * 65535).astype("<u2")
    (tmp_path / "x.tif").write_bytes(tiff(values.tobytes(), bits=16, zero_is_white=True))
    np.testing.assert_allclose(seen(tmp_path / "x.tif").astype(int), 255 - EIGHT, atol=1)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ((RAMP * 65535).astype(np.int32), "integers of 32 bits"),
        ((RAMP * 255).astype(np.float32), r"0 \(black\) to 1 \(white\), this has 0 to 255"),
        ((RAMP - 0.5).astype(np.float32), r"this has -0\.5 to 0\.5"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "this has nan"),
    ],
    ids=["32 bits", "floats to 255", "negative", "not a number"],
)
def test_what_has_no_known_white_is_refused_by_file(
    tmp_path: Path, pixels: np.ndarray, message: str
) -> None:
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=rf"x\.tif: cannot read the image \(.*{message}"):
        decode(tmp_path / "x.tif", GREY)


def test_a_mode_that_pillow_cannot_convert_is_named(tmp_path: Path) -> None:
    Image.frombytes("LAB", (4, 4), bytes(48)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif: .*mode LAB is not read: convert it to RGB"):
        decode(tmp_path / "x.tif", COLOUR)


def test_a_deep_image_is_turned_upright_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(np.rint(RAMP * 65535).astype(np.uint16)).save(tmp_path / "x.png", exif=exif)
    assert torch.equal(
        decode(tmp_path / "x.png", GREY)[0], torch.from_numpy(np.rot90(EIGHT, -1).copy())
    )


def tiff(data: bytes, *, bits: int, zero_is_white: bool = False) -> bytes:
    """A little-endian TIFF of 16 by 16 grey values."""
    tags = {
        256: 16,  # width
        257: 16,  # height
        258: bits,
        259: 1,  # not compressed
        262: 0 if zero_is_white else 1,
        273: 8,  # where the values start
        277: 1,  # a channel
        278: 16,  # rows in a strip
        279: len(data),
    }
    directory = len(tags).to_bytes(2, "little")
    for tag, value in tags.items():
        directory += tag.to_bytes(2, "little") + (4).to_bytes(2, "little")  # of 32 bits
        directory += (1).to_bytes(4, "little") + value.to_bytes(4, "little")
    start = 8 + len(data)
    return b"II*\0" + start.to_bytes(4, "little") + data + directory + bytes(4)
