"""Files that are written whole or not at all, whatever they are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from spt_kernels.files.atomic import write_atomically


@pytest.mark.parametrize("letter", ["a", "é", "写", "🌷"])
def test_any_name_that_a_file_may_have_is_written(letter: str, tmp_path: Path) -> None:
    """The temporary file had a longer one, of letters that take several bytes each."""
    path = tmp_path / (letter * (250 // len(letter.encode())) + ".png")
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert [own.name for own in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"new"
