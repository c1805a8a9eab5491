"""Every `spt-kernels …` of the documentation, in a block or in a sentence, is one that exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from spt_kernels.cli.app import make_app
from tests.docs.pages import EXAMPLES, PAGES, README, ROOT, blocks_of, codes_of

_SHELL = ("sh", "shell")


def lines_of(page: Path) -> list[str]:
    """The command lines of a page, each whole."""
    texts = [block.text for block in blocks_of(page) if block.language in _SHELL]
    lines = [line for text in texts for line in text.replace("\\\n", " ").splitlines()]
    return lines + [code.replace("\n", " ") for code in codes_of(page)]


WITH_COMMANDS = [
    page
    for page in (README, EXAMPLES, *PAGES)
    if any(line.startswith(("spt-kernels ", "python -m bench")) for line in lines_of(page))
]


@pytest.fixture(scope="module")
def group() -> Any:
    return typer.main.get_command(make_app())


def parse(group: Any, line: str) -> None:
    """Raise unless a command and its options are there, each option with its value."""
    words = [word for word in shlex.split(line, comments=True) if word != "…"]
    if words[1:] in (["--version"], ["--help"]):
        return
    command = group.commands[words[1]]
    command.make_parser(command.context_class(command)).parse_args(words[2:])


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.stem)
def test_commands_parse(page: Path, group: Any) -> None:
    for line in lines_of(page):
        if line.startswith("spt-kernels "):
            parse(group, line)
        for module in re.findall(r"python -m (bench[\w.]*)", line):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), line


def test_a_line_that_is_wrong_is_noticed(group: Any) -> None:
    parse(group, "spt-kernels finetune … --epochs 2   # as it is")
    with pytest.raises(KeyError):
        parse(group, "spt-kernels fintune --epochs 2")
    for line in ("spt-kernels finetune --epoch-count 2", "spt-kernels finetune --epochs"):
        with pytest.raises(typer.BadParameter.__mro__[1]):  # typer does not name a usage error
            parse(group, line)
