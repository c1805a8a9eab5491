"""docs/ERRORS.md has every exception and exit code, and no message that the code does not give."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from functools import cache

import pytest

import spt_kernels as spt
from spt_kernels import errors
from spt_kernels.cli import app, bench, benchmark
from tests.cli.test_commands import COMMANDS
from tests.docs.pages import ROOT

TEXT = (ROOT / "docs" / "ERRORS.md").read_text()
MESSAGES = re.findall(r"^\| `([^`]+)` \|", TEXT[TEXT.index("## A task file") :], re.MULTILINE)


def text_of(node: ast.expr) -> str:
    """A string of the code with `…` for what is put into it."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


@cache
def texts() -> str:
    """All strings of the package, a line each."""
    found = []
    for path in (ROOT / "spt_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr | ast.Constant):
                found.append(text_of(node).replace("\n", " "))
    return "\n".join({text for text in found if " " in text and len(text) < 1000})


def test_every_message_is_given_somewhere() -> None:
    assert len(MESSAGES) > 80
    unknown = [
        message
        for message in MESSAGES
        if not re.search(".*".join(map(re.escape, message.strip("…").split("…"))), texts())
    ]
    assert unknown == []


def test_every_exception_is_explained() -> None:
    own = [
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    ]
    assert own
    for name in own:
        home = "spt" if name in spt.__all__ else "spt_kernels.errors"
        base = getattr(errors, name).__mro__[1].__name__
        assert f"| `{home}.{name}` | `{base}` |" in TEXT


@pytest.mark.parametrize("name", COMMANDS)
def test_the_exit_codes_of_every_command_are_there(name: str) -> None:
    rows = dict(re.findall(r"^\| (\d+) \|[^|]*\|([^|]*)\|$", TEXT, re.MULTILINE))
    assert f"`{name}`" in TEXT
    assert set(rows) == {"0", "1", str(app.USER_ERROR), str(app.INTERRUPTED)}
    assert benchmark.SOME_FAILED == bench.GOT_WORSE == 1
    module = importlib.import_module(f"spt_kernels.cli.{name}")
    numbers = [n for n, value in vars(module).items() if n.isupper() and value == 1]
    returned = any(re.search(rf"return {n} if", inspect.getsource(module)) for n in numbers)
    assert returned == bool(re.search(rf"`{name}\b", rows["1"]))
