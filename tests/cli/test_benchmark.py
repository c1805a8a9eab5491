"""`spt-kernels benchmark` as a user calls it: a small suite of one's own, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spt_kernels.cli.app import run
from tests.cli.test_commands import SHAPE, complaint_of, json_of, output_of
from tests.finetuning.pictures_on_disk import write_task, write_weights
from tests.finetuning.undrawn import draw_nothing


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    write_task(folder / "photos" / "Far" / "blues", train=5, test=3)
    write_task(folder / "photos" / "Near" / "reds", train=5, test=3)
    write_weights(folder / "base.safetensors")
    return folder


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


def command(place: Path, output: str, *more: str) -> list[str]:
    model = ["-m", "vit_tiny_patch16_224", *SHAPE, "-w", str(place / "base.safetensors")]
    short = ["--epochs", "1", "--batch-size", "8", "--jobs", "0", "--devices", "cpu"]
    root = ["--root", str(place / "photos"), "-o", str(place / output)]
    return ["benchmark", "folders", *root, *model, *short, *more]


def test_a_suite_is_run_gone_on_with_and_shown_again(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    one = command(place, "runs", "--methods", "linear,bias", "--tasks", "reds")
    assert run(one) == 0
    streams = capsys.readouterr()
    assert "1/2  reds, linear, seed 0: " in streams.err
    assert "photos, groups" in streams.out
    assert max(map(len, streams.out.splitlines())) <= 80
    picture = place / "x.png"
    both = command(place, "runs", "--methods", "linear,bias", "--picture", str(picture))
    assert run([*both, "--json"]) == 0
    streams = capsys.readouterr()
    assert "2 of 4 runs are finished already" in streams.err
    table = json.loads(streams.out)
    assert picture.is_file()
    assert [row["method"] for row in table["rows"]] == ["linear", "bias"]
    assert table["groups"] == {"Near": ["reds"], "Far": ["blues"]}  # the order it was begun in
    assert json_of(["benchmark", "table", str(place / "runs")], capsys) == table
    text = output_of(["benchmark", "table", str(place / "runs"), "--markdown"], capsys)
    assert "| method | trained | % | Near | Far | mean |" in text
    setting = json.loads((place / "runs" / "benchmark.json").read_text())
    assert setting["recipe"]["preset"] == "paper"
    assert setting["form"] == {"fit": "squash", "augment": "none"}


def test_a_run_that_fails_is_told_by_the_exit_code(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = command(place, "failed", "--methods", "linear,spt-lora", "--tasks", "reds", "-q")
    assert run([*asked, "--budget", "1000M"]) == 1
    out = capsys.readouterr().out
    assert "failed: reds, spt-lora, seed 0: budget=1,000,000,000 is more" in out
    assert run(["benchmark", "table", str(place / "failed")]) == 0
    other = command(place, "failed", "--methods", "bias", "--tasks", "reds", "-q")
    assert run(other) == 0, "what failed before was not asked for"
    assert "failed: reds, spt-lora" in capsys.readouterr().out


def test_options_are_of_the_methods_that_read_them(place: Path) -> None:
    from spt_kernels.cli.benchmark_options import MethodsOptions, SeedsOptions, TaskOptions

    recipe = SeedsOptions(seed="3,1", lr=0.5, recipe="published-code")
    assert recipe.seeds() == (3, 1)
    assert recipe.chosen().seed == 0
    assert (recipe.chosen().lr, recipe.chosen().schedule) == (0.5, "epoch")
    methods = MethodsOptions("lora-8,spt-lora,dense-gradient", budget="0.4M", rank=4)
    lora, ours, entries = methods.every(recipe.preset_for("vtab"))
    assert (lora.budget, lora.rank) == (None, None)
    assert (ours.budget, ours.rank, ours.samples) == (400_000, 4, 512)
    assert (entries.budget, entries.rank) == (400_000, None)
    paper = SeedsOptions()
    assert paper.preset_for("vtab").form["fit"] == "squash"
    assert paper.preset_for("fgvc").form["augment"] == "resized-crop-flip"
    which = TaskOptions(choices=["lr=1e-3,5e-4", "weight-decay=0,1e-4", "budget=0.4M,1%"])
    assert which.values() == {
        **{"lr": (1e-3, 5e-4), "weight_decay": (0, 1e-4), "budget": (400_000, 0.01)}
    }


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--methods", "linear", "--budget", "0.4M"], "--budget: none of linear has it"),
        (["--methods", "loras"], "--methods: expected one of"),
        (["--seeds", "one"], "--seeds: expected numbers"),
        (["--choose", "lr"], "--choose: expected NAME=A,B,…"),
        (["--choose", "lr=a,b"], "--choose: expected numbers for lr, got 'a'"),
        (["--choose", "colour=1,2"], "expected one of budget, rank"),
        (["--tasks", "greens"], "--tasks: expected of blues, reds, got 'greens'"),
        (["--devices", "cuda:99"], "device: cuda:99 is not here"),
        (["elsewhere"], "FOLDER: goes with table"),
        (["--ray", "auto"], "--devices: the cluster decides"),
        (["--val-every", "2"], "--val-every: these runs have no validation images to look at"),
        (["--patience", "3"], "--patience: what is reported of blues is trained on all images"),
        (
            ["--patience", "3", "--choose", "lr=1e-3,1e-2"],
            "--patience: what is reported of blues is trained on all images",
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_run(
    more: list[str], words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in complaint_of(command(place, "none", *more), capsys)
    assert not (place / "none").exists()


def test_mistakes_in_what_is_asked_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["benchmark", "imagenet"], "WHAT: expected vtab, fgvc, folders or table"),
        (["benchmark", "table"], "FOLDER: table needs"),
        (["benchmark", "table", str(place)], "no benchmark in"),
        (["benchmark", "table", str(place), "--epochs", "3"], "--epochs: goes with a run"),
        (["benchmark", "vtab", "-m", "vit_tiny_patch16_224"], "--root: name the folder"),
        (["benchmark", "vtab", "--root", str(place)], "--output: name a folder"),
        (
            ["benchmark", "fgvc", "--root", str(place), "-o", "x", "-m", "y"],
            f"{place}; --tasks takes those that are whole; incomplete: cub-200-2011: {place}: no",
        ),
        (
            ["benchmark", "fgvc", "--root", str(place), "-o", "x", "-m", "y"],
            f"or cub; nabirds: {place}: no folder called nabirds; oxford-flowers: ",
        ),
    ):
        assert words in complaint_of(arguments, capsys)
