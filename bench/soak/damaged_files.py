"""Task files that are flipped, cut, spliced or made up: each is refused by name, or is the same."""

from __future__ import annotations

import random
import struct
import tempfile
from pathlib import Path

import torch

import spt_kernels as spt
from spt_kernels.task.file.format import read

from .small import tuned_model


def check(count: int, seed: int) -> str:
    """Read `count` damaged files.

    Raises:
        AssertionError: one was accepted, or ended in another error than `DeltaFormatError`.
    """
    dice = random.Random(seed)
    refused = same = 0
    with tempfile.TemporaryDirectory() as place:
        originals = []
        for n, dtype in enumerate((torch.float32, torch.bfloat16)):
            path = Path(place) / f"{n}.safetensors"
            spt.save_delta(tuned_model(n), path, dtype=dtype)
            originals.append(path.read_bytes())
        path = Path(place) / "damaged.safetensors"
        for _ in range(count):
            kind = dice.choice((flipped, cut, grown, spliced, zeroed, crafted))
            content = kind(dice, originals)
            if content in originals:
                same += 1
                continue
            path.write_bytes(content)
            try:
                read(path)
            except spt.DeltaFormatError:
                refused += 1
            except BaseException as error:
                raise AssertionError(_kept(content, f"{kind.__name__}: {error!r}")) from error
            else:
                raise AssertionError(_kept(content, f"{kind.__name__}: it was accepted"))
    return f"{refused:,} refused, {same:,} came out unchanged"


def flipped(dice: random.Random, originals: list[bytes]) -> bytes:
    """One to eight bits, most of them in the header, where they matter most."""
    content = bytearray(dice.choice(originals))
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(dice.randint(1, 8)):
        at = dice.randrange(header if dice.random() < 0.7 else len(content))
        content[at] ^= 1 << dice.randrange(8)
    return bytes(content)


def cut(dice: random.Random, originals: list[bytes]) -> bytes:
    """The beginning of a file."""
    content = dice.choice(originals)
    return content[: dice.randrange(len(content))]


def grown(dice: random.Random, originals: list[bytes]) -> bytes:
    """More than a file."""
    return dice.choice(originals) + dice.randbytes(dice.randint(1, 64))


def spliced(dice: random.Random, originals: list[bytes]) -> bytes:
    """The beginning of one and the end of another."""
    first, second = dice.choice(originals), dice.choice(originals)
    at = dice.randrange(min(len(first), len(second)))
    return first[:at] + second[at:]


def zeroed(dice: random.Random, originals: list[bytes]) -> bytes:
    """A block that never reached the disk."""
    content = bytearray(dice.choice(originals))
    at = dice.randrange(len(content))
    stop = min(len(content), at + dice.choice((1, 16, 512, 4096)))
    content[at:stop] = bytes(stop - at)
    return bytes(content)


def crafted(dice: random.Random, originals: list[bytes]) -> bytes:
    """A header that says something else: another length, type, shape or offset."""
    content = dice.choice(originals)
    size = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + size].decode()
    old, new = dice.choice(
        (
            ('"F32"', '"F64"'),
            ('"BF16"', '"F32"'),
            ('"shape":[', '"shape":[4294967296,'),
            ('"data_offsets":[', '"data_offsets":[9223372036854775807,'),
            ('"U8"', '"I64"'),
            ("{", "{{"),
            ("0", "1"),
            ("1", "-1"),
            (":", ";"),
        )
    )
    places = [n for n in range(len(header)) if header.startswith(old, n)]
    if places:
        at = dice.choice(places)
        header = header[:at] + new + header[at + len(old) :]
    length = len(header.encode()) if dice.random() < 0.8 else dice.getrandbits(dice.randint(1, 64))
    return struct.pack("<Q", length) + header.encode() + content[8 + size :]


def _kept(content: bytes, what: str) -> str:
    """What to say of a file that went wrong, which is kept."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors", delete=False) as file:
        file.write(content)
    return f"{what}; the file is {file.name}"
