"""What a JSON file does not hold is told by whoever asks for it, with the file's name."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest

from spt_kernels.files.json_file import read_object, read_objects

HELD = {"job": {"recipe": {"lr": 0.1}, "of": [{"name": "a"}]}, "seconds": None}


def test_what_is_there_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(HELD))
    read = read_object(path)
    assert read == HELD
    assert type(read.plain()["job"]["of"][0]) is dict
    assert read.plain() == HELD
    assert read.get("other") is None
    for same in (pickle.loads(pickle.dumps(read)), copy.deepcopy(read)):
        with pytest.raises(ValueError, match="expected 'x' in it"):
            same["job"]["x"]


def test_what_is_missing_names_its_file_at_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(HELD))
    read = read_object(path)
    for ask, words in (
        (lambda: read["epochs"], r"x\.json: expected 'epochs' in it, got job, seconds"),
        (lambda: read["job"]["recipe"]["wd"], r"x\.json: expected 'wd' in it, got lr"),
        (lambda: read["job"]["of"][0]["size"], r"x\.json: expected 'size' in it, got name"),
    ):
        with pytest.raises(ValueError, match=words):
            ask()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"x\.json: not JSON"),
        (b'{"a": 1', r"x\.json: not JSON"),
        (b"\xff\xfe\x00", r"x\.json: not JSON"),
        (b"[" * 100_000, r"x\.json: not JSON"),
        (b"[1]", r"x\.json: expected a JSON object, got list"),
        (b"null", r"x\.json: expected a JSON object, got NoneType"),
    ],
)
def test_what_is_no_object_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_object(path)


def test_of_lines_the_number_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"b": 2}\n')
    rows = read_objects(path)
    assert rows == [{"a": 1}, {"b": 2}]
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: expected 'a' in it, got b"):
        rows[1]["a"]
    path.write_text('{"a": 1}\n{"b"')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: not JSON"):
        read_objects(path)
