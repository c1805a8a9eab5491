"""Where a file may be written, and what stays what it was."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from spt_kernels.files.atomic import write_atomically


@pytest.mark.parametrize("letter", ["a", "é", "花", "🌷"])
def test_a_name_may_be_as_long_as_the_system_lets_it(letter: str, tmp_path: Path) -> None:
    path = tmp_path / (letter * (255 // len(letter.encode())))
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_is_written_to_and_stays_one(linked: bool, tmp_path: Path) -> None:
    path, pipe = tmp_path / "link", tmp_path / "pipe"
    os.mkfifo(pipe)
    path.symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(path if linked else pipe, b"values")
        assert os.read(reader, 100) == b"values"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert path.is_symlink()


def test_what_the_process_hands_on_is_written_to(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    try:
        write_atomically(f"/dev/fd/{writer}", b"values")
        assert os.read(reader, 100) == b"values"
    finally:
        os.close(reader)
        os.close(writer)
