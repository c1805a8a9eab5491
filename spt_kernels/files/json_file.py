"""JSON objects in files: damage, or a value that is not there, is told with the file's name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn


class JsonObject(dict[str, Any]):
    """An object of a JSON file, at whatever depth, that tells what is missing in which file."""

    def __init__(self, values: dict[str, Any], file: str) -> None:
        super().__init__(values)
        self.file = file

    def __missing__(self, name: str) -> NoReturn:
        told = ", ".join(self) or "nothing"
        raise ValueError(f"{self.file}: expected {name!r} in it, got {told}")

    def plain(self) -> dict[str, Any]:
        """The same as dictionaries that tell nothing, to be kept."""
        values: dict[str, Any] = json.loads(json.dumps(self))
        return values


def read_object(path: str | os.PathLike[str]) -> JsonObject:
    """Read a file that is one JSON object.

    Its values are read as those of a `dict`, but a name that is not in it is a `ValueError`.

    Raises:
        ValueError: it is damaged, or something else.
        OSError: it cannot be read.
    """
    file = os.fspath(path)
    return _parsed(Path(path).read_bytes(), file, file)


def read_objects(path: str | os.PathLike[str]) -> list[JsonObject]:
    """Read a file with one JSON object in each line; errors as `read_object`."""
    file = os.fspath(path)
    lines = Path(path).read_bytes().splitlines()
    return [_parsed(line, file, f"{file}, line {i}") for i, line in enumerate(lines, 1)]


def _parsed(text: bytes, file: str, place: str) -> JsonObject:
    try:
        value = json.loads(text, object_hook=lambda values: JsonObject(values, place))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    if not isinstance(value, JsonObject):
        raise ValueError(f"{place}: expected a JSON object, got {type(value).__name__}")
    return value
