"""Tables are at most as wide as the terminal, and neither a path nor a figure is broken."""

from __future__ import annotations

import pytest
from rich.console import Console

from spt_kernels.cli.terminal import Terminal, facts, table, unbroken

NAME = "blocks.10.attn.qkv.weight"
COLUMNS = ("tensor", "how", "shape", "trained", "dtype")
ROWS = [
    (NAME, "entries", "2304×768", "1,234,567", "float32"),
    ("[red]a[/blue]", "whole", "5", "3", "float32"),
]


def shown(part: object, width: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    terminal = Terminal()
    terminal.out = Console(width=width, highlight=False)
    terminal.show({}, part)  # type: ignore[arg-type]
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("is_wide", [False, True])
def test_a_table_that_fits_is_one(is_wide: bool, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(table(COLUMNS, ROWS, "A title", is_wide=is_wide), 80, capsys)
    assert len(lines) == 4
    assert lines[0] == "A title"
    assert lines[2].split() == list(ROWS[0])
    assert lines[3].split() == list(ROWS[1])  # a class may have the name of a colour
    # figures end where the titles of their columns do
    assert lines[1].index("trained") + len("trained") == lines[2].index("1,234,567") + 9


@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("width", [64, 50, 40, 30])
def test_what_is_too_wide_is_folded_then_parted(
    width: int, is_wide: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(table(COLUMNS, ROWS, is_wide=is_wide), width, capsys)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for cell in (*COLUMNS[1:], *ROWS[0][1:], "[red]a[/blue]"):
        assert cell in text, cell
    parts = text.count("tensor")
    assert (parts == 1) == (width > 50)
    assert text.count("[red]a[/blue]") == parts


def test_prose_is_broken_between_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    prose = ", ".join(unbroken(f"tulip {i} %") for i in range(6))
    made = table(("image", "class"), [("a.png", prose)], has_prose=True)
    whole = ", ".join(f"tulip {i} %" for i in range(6))
    assert shown(made, 80, capsys)[1].endswith(whole)
    lines = shown(made, 36, capsys)
    assert max(map(len, lines)) <= 36
    assert all(part in "\n".join(lines) for part in whole.split(", "))
    assert len(lines) > 3


def test_paths_are_whole_in_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/a/very/long path/" + "folder/" * 12 + "task.safetensors"
    made = facts([("task file", f"{unbroken(path)}, 12 KiB, whole"), ("note", "ab " * 30)])
    lines = shown(made, 40, capsys)
    assert any(f"{path}," in line for line in lines)
    assert max(len(line) for line in lines if "folder" not in line) <= 40
    assert lines[1].split()[0] == "12"  # the rest of the fact
    assert lines[2].startswith(" note")


def test_a_note_comes_on_stderr_though_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(quiet=True, as_json=True).note("mind [this]")
    streams = capsys.readouterr()
    assert (streams.out, streams.err) == ("", "mind [this]\n")
