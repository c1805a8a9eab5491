"""Help, completion, and messages that name options as they are typed."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

import spt_kernels
from spt_kernels.cli.app import run
from spt_kernels.cli.command import broken
from tests.cli.test_commands import COMMANDS, complaint_of, output_of

VIT = ["-m", "vit_tiny_patch16_224"]


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_flags_have_no_type_and_any_terminal_is_wide_enough(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns, widest in ((60, 60), (80, 80), (300, 100)):
        monkeypatch.setenv("COLUMNS", str(columns))
        text = output_of([*([name] if name else []), "--help"], capsys)
        assert "<bool>" not in text
        assert "<path>" not in text
        assert "Path]" not in text
        assert max(len(line) for line in text.splitlines()) <= widest


@pytest.mark.parametrize("name", COMMANDS)
def test_a_narrow_terminal_cuts_nothing(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dots = []
    for columns in ("40", "60", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        dots.append(output_of([name, "--help"], capsys).count("…"))
    assert dots == [dots[-1]] * 3


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_may_be_copied_from_a_narrow_terminal(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = []
    for columns in ("60", "80", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        examples.append(examples_in(output_of([name, "--help"], capsys)))
    assert any(line.startswith("spt-kernels") for line in examples[-1])
    assert examples == [examples[-1]] * 3


@pytest.mark.parametrize("width", range(30, 100, 5))
def test_an_example_in_more_lines_is_the_same_command(width: int) -> None:
    line = (
        """  spt-kernels fit -m vit_base_patch16_224 --gib 4 --card "RTX 4060" --method full \\"""
    )
    parts = broken(line, width).split("\n")
    assert all(part.endswith(" \\") for part in parts)
    joined = "".join(part.removesuffix("\\") for part in parts)
    assert shlex.split(joined) == shlex.split(line.removesuffix("\\"))
    assert max(map(len, parts)) <= max(width, 6 + len("vit_base_patch16_224") + 2)


def examples_in(text: str) -> list[str]:
    """What a shell gets of the indented lines of a help, and of those that they go on in."""
    lines = [line.rstrip() for line in text.partition("╭")[0].splitlines()]
    below_usage = lines[lines.index("", 1) :]
    shown = [line for line in below_usage if line.startswith("   ")]
    joined = "\n".join(shown).replace("\\\n", " ")
    return [" ".join(line.split()) for line in joined.splitlines()]


@pytest.mark.parametrize(
    ("name", "unread"),
    [
        ("plan", ["--quiet"]),
        ("inspect", ["--quiet"]),
        ("compare", ["--quiet"]),
        ("plot", ["--quiet"]),
        ("merge", ["--quiet", "--new-head"]),
        ("evaluate", ["--new-head"]),
        ("predict", ["--new-head"]),
        ("memory", ["--weights", "--pretrained", "--new-head"]),
        ("bench", ["--weights", "--pretrained", "--new-head"]),
    ],
)
def test_options_that_are_not_read_are_not_offered(
    name: str, unread: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = output_of([name, "--help"], capsys)
    assert [option for option in unread if option in text] == []


def test_scripts_may_silence_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in complaint_of(["inspect", "none", "--quiet"], capsys)


def completed(words: str) -> list[str]:
    """What a shell offers for the last of these words."""
    code = "import sys\nfrom spt_kernels.cli import main\nmain()\nassert 'torch' not in sys.modules"
    environment = {
        "_SPT_KERNELS_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_a_shell_completes_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert completed("spt-kernels pre") == ["predict"]
    assert completed("spt-kernels evaluate --conf") == ["--confusion"]
    assert "--install-completion" in output_of(["--help"], capsys)


def test_the_package_can_be_run() -> None:
    command = [sys.executable, "-m", "spt_kernels", "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == spt_kernels.__version__


def test_an_error_names_the_option_as_typed(
    tmp_path: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        (["finetune", "-o", "x", "--method", "best"], "--method: expected one of"),
        (["finetune", "-o", "x", "--val-every", "0"], "--val-every: expected more than zero"),
        (["memory", "-m", "vit_tiny_patch16_224", "--image-size", "0"], "--image-size: expected"),
        (["finetune", "-o", "x", "--method", "spt_lora"], "got 'spt_lora'; did you mean spt-lora"),
        (["finetune", *VIT, "-o", "x", "-d", "x"], "let timm download them (--pretrained)"),
        (["compare", f"{tmp_path}/none"], "RUN: no such folder"),
        (["inspect", "none"], "spt-kernels: no such file: none"),  # what is no option stays
    ):
        assert words in complaint_of(arguments, capsys)


def test_what_nothing_goes_on_with_is_only_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spt_kernels.finetuning.results.comparison.compare_runs", interrupt)
    assert run(["compare", "x"]) == 130
    assert capsys.readouterr().err.strip() == "spt-kernels: stopped"


def test_a_name_that_is_no_option_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("fits, colour: one of them is no option")

    monkeypatch.setattr("spt_kernels.finetuning.results.comparison.compare_runs", fail)
    assert run(["compare", "x"]) == 2
    assert capsys.readouterr().err == "spt-kernels: fits, colour: one of them is no option\n"
