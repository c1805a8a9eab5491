"""A package that an extra brings and that is missing is one line that names the extra."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from spt_kernels import cli
from spt_kernels.cli.app import run
from spt_kernels.errors import MissingExtra, needed

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

EXTRAS = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]
VIT = ["-m", "vit_tiny_patch16_224"]
# by package: what no longer runs without it
COMMANDS: dict[str, list[list[str]]] = {
    "timm": [
        ["demo", "-o", "out"],
        ["finetune", *VIT, "-d", ".", "-o", "out"],
        ["segment", *VIT, "-d", ".", "-o", "out"],
        ["sensitivity", *VIT, "-d", ".", "-o", "out"],
        ["memory", *VIT],
        ["evaluate", "."],
        ["merge", ".", "-o", "out"],
        ["bench", "table7"],
    ],
    "PIL": [
        ["demo", "-o", "out"],
        ["finetune", *VIT, "-d", ".", "-o", "out"],
        ["segment", *VIT, "-d", ".", "-o", "out"],
        ["sensitivity", *VIT, "-d", ".", "-o", "out"],
        ["evaluate", "."],
    ],
    "matplotlib": [
        ["demo", "-o", "out"],
        ["finetune", *VIT, "-d", ".", "-o", "out", "--method", "full"],
        ["segment", *VIT, "-d", ".", "-o", "out", "--method", "full"],
        ["memory", *VIT, "-o", "out.png"],
        ["plan", "no.sensitivity", "--picture", "out.png"],
        ["plot", "blocks", "no.sensitivity", "-o", "out.pdf"],
        ["bench", "table7", "-o", "out"],
    ],
    "sklearn": [["demo", "-o", "out"]],
}
FOLDERS = ("finetuning", "segmentation", "costs")  # whose files import what extras bring
PIP_NAMES = {"PIL": "pillow", "sklearn": "scikit-learn"}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """A package knows its modules as attributes, too, and keeps what it looked up in them."""
    packages = [importlib.import_module(f"spt_kernels.{name}") for name in (*FOLDERS, "cli")]
    before = [dict(vars(package)) for package in packages]
    yield
    for package, own in zip(packages, before, strict=True):
        vars(package).clear()
        vars(package).update(own)


def without(package: str, monkeypatch: pytest.MonkeyPatch, *fresh: str) -> None:
    """Let `package` be as if it was not installed, and all that may have it load anew."""
    fresh = (*(f"spt_kernels.{name}." for name in FOLDERS), *fresh)
    for name in list(sys.modules):
        if name.startswith(fresh):
            monkeypatch.delitem(sys.modules, name)
        elif name == package or name.startswith(f"{package}."):
            monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("package", "arguments"),
    [(package, arguments) for package, each in COMMANDS.items() for arguments in each],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_every_command_names_the_extra_before_it_does_anything(
    package: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    without(package, monkeypatch)
    assert run([*arguments, "-q"]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    [line] = streams.err.splitlines()
    wanted = PIP_NAMES.get(package, package)
    assert line.startswith("spt-kernels: ")
    assert line.endswith(f" needs {wanted}: pip install 'spt_kernels[cli]'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_what_the_command_line_itself_is_made_of(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(package, monkeypatch, "spt_kernels.cli.")
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"spt-kernels: the command line needs {package}: pip install 'spt_kernels[cli]'"


@pytest.mark.parametrize(
    ("package", "module", "extra"),
    [
        ("timm", "spt_kernels.finetuning.base.models", "cli"),
        ("PIL", "spt_kernels.finetuning.images.pixels", "cli"),
        ("PIL", "spt_kernels.finetuning.images.digits", "cli"),
    ],
)
def test_an_import_from_python_names_the_extra(
    package: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(package, monkeypatch)
    with pytest.raises(MissingExtra, match=rf"pip install 'spt_kernels\[{extra}\]'"):
        importlib.import_module(module)


def test_a_package_that_another_one_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm imports torchvision, which then is what is missing."""

    class Timm(MetaPathFinder):
        def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
            if name == "timm":
                raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")
            return None

    without("timm", monkeypatch)
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Timm(), *sys.meta_path])
    with pytest.raises(MissingExtra, match="needs torchvision: pip install"):
        importlib.import_module("spt_kernels.finetuning.base.models")


def test_a_mistake_of_our_own_is_not_blamed_on_an_extra() -> None:
    with pytest.raises(ModuleNotFoundError) as mistake, needed("everything"):
        importlib.import_module("spt_kernels.no_such_module")
    assert not isinstance(mistake.value, MissingExtra)


def test_the_extra_of_the_command_line_brings_what_its_commands_import() -> None:
    brought = {requirement.partition(">")[0] for requirement in EXTRAS["cli"]}
    assert {PIP_NAMES.get(name, name) for name in COMMANDS} <= brought
    assert {"typer", "rich", "torchvision"} <= brought
    assert any(requirement.startswith("peft") for requirement in EXTRAS["peft"])
