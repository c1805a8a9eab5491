"""Kinds of JSON values: what is of one and what is not, and how the first that is not is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spt_kernels.files.json_file import JsonObject, read_object
from spt_kernels.files.json_kinds import (
    AMOUNT,
    COUNT,
    COUNTS,
    FLAG,
    OBJECT,
    SHARE,
    SIZE,
    TEXT,
    TEXTS,
    Kind,
    checked,
    or_null,
)

NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (AMOUNT, [0, 2, 2.5], [-1, NAN, INFINITE, True, "2", None, [2]]),
        (SHARE, [0, 1, 0.5], [-0.1, 1.1, NAN, False]),
        (COUNT, [0, 10**12], [-1, 1.0, True, "1"]),
        (SIZE, [1], [0, 2.0]),
        (FLAG, [True, False], [0, 1, "true", None]),
        (TEXT, ["", "x"], [1, None, ["x"]]),
        (OBJECT, [{}, {"a": 1}], [[], "a", None]),
        (TEXTS, [[], ["a"]], ["a", [1], {"a": 1}]),
        (COUNTS, [[], [0, 3]], [[-1], ["1"], 3]),
        (or_null(COUNT), [None, 3], [-3, "x"]),
    ],
)
def test_what_is_of_a_kind(kind: Kind, good: list[Any], bad: list[Any]) -> None:
    assert all(kind.holds(value) for value in good)
    assert not any(kind.holds(value) for value in bad)


def test_the_first_that_is_not_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": 1, "of": {"b": ["long"] * 30, "c": -1}, "more": None}))
    read = read_object(path)
    assert checked(read, {"a": COUNT, "lacking": TEXT}) is read
    said = rf"{path}: of\.b: expected a whole number of 0 or more, got .{{57}}\.\.\.$"
    with pytest.raises(ValueError, match=said):
        checked(read, {"of": {"b": COUNT, "c": COUNT}})
    with pytest.raises(ValueError, match="more: expected an object, got null"):
        checked(read, {"more": {"d": COUNT}})


def test_a_line_is_told_by_its_number() -> None:
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: a: expected a string, got 1"):
        checked(JsonObject({"a": 1}, "x.jsonl, line 2"), {"a": TEXT})
