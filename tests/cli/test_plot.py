"""`spt-kernels plot`: every kind from files, what it shows and writes, how it answers mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from spt_kernels.cli.app import run as command
from spt_kernels.cli.plot import KINDS
from tests.cli.test_commands import complaint_of, json_of, output_of
from tests.plots.made_up import A, B, plan, run, scores


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plot")
    for name, own in (("a", A), ("b", B)):
        scores(own).save(folder / f"{name}.sensitivity")
    for pretraining in ("supervised", "mae"):
        for task, own in (("x", A), ("y", B if pretraining == "mae" else A)):
            at = folder / pretraining / task / "spt-lora" / "seed0"
            run(at, 0.5, budget=10)
            plan(own).save(at / "plan.safetensors")
    for samples, method in ((240, "spt-lora"), (800, "spt-lora"), (800, "spt-adapter")):
        run(folder / "runs" / f"{method}-{samples}", samples / 1000, method, samples=samples)
    return folder


INPUTS = {
    "allocation": ["supervised/x/spt-lora/seed0"],
    "blocks": ["a.sensitivity", "b.sensitivity", "--budget", "10"],
    "operations": ["supervised", "mae"],
    "pretraining": ["supervised", "mae", "--label", "ImageNet-21k", "--label", "MAE"],
    "overlap": ["a.sensitivity", "b.sensitivity", "-b", "10"],
    "budget": ["runs"],
    "structure": ["runs"],
    "samples": ["runs", "--method", "spt-lora"],
}
SHOWN = {
    "allocation": ["fc1", "selected"],
    "blocks": ["blocks with most", "1: 80 %"],
    "operations": ["mae: y", "fc1: 80 %"],
    "pretraining": ["ImageNet-21k", "450.0"],
    "overlap": ["a, b", "33.3 %", "× 3.5"],
    "budget": ["spt-adapter", "80.0"],
    "structure": ["spt-lora", "24.0"],
    "samples": ["spt-lora, samples 240", "24.0"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_shown_drawn_and_written(
    kind: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    picture, numbers = tmp_path / "a.png", tmp_path / "a.csv"
    text = output_of(
        ["plot", kind, *INPUTS[kind], "-o", str(picture), "--csv", str(numbers)], capsys
    )
    for words in SHOWN[kind]:
        assert words in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    header, first, *_ = numbers.read_text().splitlines()
    assert header.count(",") == first.count(",") > 2
    value = json_of(["plot", kind, *INPUTS[kind]], capsys)
    assert value["written"] == []


def test_groups_and_notes_are_told_to_machines(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    value = json_of(["plot", "blocks", "supervised", "mae"], capsys)
    assert value["groups"]["mae"]["shares"]["y"] == [0.2, 0.8, 0]
    assert value["notes"] == []


def test_mistakes_are_one_line(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    there = tmp_path / "there.pdf"
    there.touch()
    for arguments, words in (
        (["pie", "a.sensitivity"], "KIND: expected one of allocation, blocks, operations"),
        (["blocks", "none"], "FILES: no such folder: none"),
        (
            ["blocks", "a.sensitivity", "-o", "a.gif"],
            "--output: expected a picture as a.png, a.pdf or a.svg",
        ),
        (["blocks", "a.sensitivity", "-o", str(there)], "is there already; --force overwrites"),
        (["blocks", "a.sensitivity", "--columns", "3", "-o", f"{tmp_path}/a.png"], "--columns:"),
        (["overlap", "a.sensitivity", "-b", "10"], "at least two to compare"),
        (["overlap", "supervised", "mae"], "holds no sensitivity.safetensors"),
        (["allocation", "supervised"], "an allocation is of one plan, got 2"),
        (["blocks", "a.sensitivity", "a.sensitivity"], "--label: two are called 'a'"),
        (["blocks", "supervised", "-b", "10"], "FILES: supervised holds no sensitivity"),
        (["budget", "runs", "--budget", "10"], "--budget: a picture of runs has none"),
        (["samples", "runs", "--method", "spt-adapter"], "two or more numbers of samples"),
    ):
        assert words in complaint_of(["plot", *arguments], capsys)
    assert list(tmp_path.iterdir()) == [there]


def test_pictures_are_overwritten_when_told(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    path.touch()
    arguments = ["plot", "blocks", str(place / "a.sensitivity"), "-b", "10", "-o", str(path)]
    assert command([*arguments, "--force"]) == 0
    assert path.read_bytes().startswith(b"<?xml")
