"""What kinds of values a JSON object holds under its names, and that they are of these."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .json_file import JsonObject


@dataclass(frozen=True)
class Kind:
    """A kind of JSON value.

    Attributes:
        words: what it is, for messages.
        holds: whether a value is of it.
    """

    words: str
    holds: Callable[[Any], bool]


# Under each name a kind, or the kinds of an object there; names that are not here hold anything
Kinds = Mapping[str, "Kind | Kinds"]


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


def _are(kind: Kind) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(kind.holds, value))


NUMBER = Kind("a number", _is_number)
AMOUNT = Kind("a number of 0 or more", lambda value: _is_number(value) and value >= 0)
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
COUNT = Kind("a whole number of 0 or more", _is_count)
SIZE = Kind("a whole number above 0", lambda value: _is_count(value) and value > 0)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a string", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
TEXTS = Kind("a list of strings", _are(TEXT))
COUNTS = Kind("a list of whole numbers of 0 or more", _are(COUNT))
RANGES = Kind("a list of ranges, each a list of its start and its stop", _are(Kind("", _is_range)))


def or_null(kind: Kind) -> Kind:
    """The kind, or null."""
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.holds(value))


def checked(value: JsonObject, kinds: Kinds) -> JsonObject:
    """The object itself, if what it holds is of the kinds that it should be of.

    Whatever is not in it is no matter here: `JsonObject` tells of it where it is asked for.

    Raises:
        ValueError: the first value that is not, with the file, its name, and what was expected.
    """
    check(value, kinds, f"{value.file}: ")
    return value


def check(value: Mapping[str, Any], kinds: Kinds, where: str = "") -> None:
    """Raise `ValueError`, as `checked` does, for an object of no file; `where` is said in front."""
    for name, kind in kinds.items():
        if name not in value:
            continue
        held = value[name]
        own = kind if isinstance(kind, Kind) else OBJECT
        if not own.holds(held):
            shown = json.dumps(held)
            shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
            raise ValueError(f"{where}{name}: expected {own.words}, got {shown}")
        if not isinstance(kind, Kind):
            check(held, kind, f"{where}{name}.")
