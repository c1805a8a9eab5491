"""The lines of a list of images, `path label`, however it was written."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

_NUMBER = re.compile("0|-?[1-9][0-9]{0,5}")  # as it is counted; `007` is a name


def rows_of(file: Path) -> list[tuple[int, str, str]]:
    """The number of each line, its path and its label.

    Raises:
        ValueError: the file cannot be read, is no text, is empty, or has a line without a label.
    """
    rows = []
    for number, line in enumerate(text_of(file).split("\n"), start=1):
        if not line.strip():
            continue
        # a path may hold spaces; a label may where a tab parts them
        parts = line.rsplit("\t", 1) if "\t" in line.strip() else line.rsplit(maxsplit=1)
        path, label = (parts[0].strip(), parts[-1].strip())
        if len(parts) != 2 or not path or not label:
            raise ValueError(f"{file}, line {number}: expected 'path label', got {line.strip()!r}")
        rows.append((number, path, label))
    if not rows:
        raise ValueError(f"{file}: the list is empty")
    return rows


def text_of(file: Path) -> str:
    """What is in a text file, its lines ended alike.

    Raises:
        ValueError: it cannot be read, or is no text.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: cannot read the list ({error.strerror})") from error
    # the mark that Windows begins a text with says how it is written, and is no part of it
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a text file in UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{file}: not a text file in UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def classes_of(labels: list[str]) -> tuple[str, ...]:
    """Names of the classes: the numbers up to the largest, or the names in alphabetical order.

    Raises:
        ValueError: a number is negative.
    """
    if all(_NUMBER.fullmatch(label) for label in labels):
        numbers = [int(label) for label in labels]
        if min(numbers) < 0:
            raise ValueError(f"labels start at 0, the list has {min(numbers)}")
        return tuple(str(label) for label in range(max(numbers) + 1))
    return tuple(sorted(set(labels)))
