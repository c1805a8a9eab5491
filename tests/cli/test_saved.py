"""The commands that use a saved model: evaluate, predict, merge, compare, inspect."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from spt_kernels.cli import evaluate
from spt_kernels.cli.app import run
from spt_kernels.finetuning.images.labelled import LabelledImages
from spt_kernels.finetuning.training.accuracy import Accuracy
from tests.finetuning.pictures_on_disk import TINY, write_images, write_task, write_weights

from .test_commands import complaint_of, json_of, output_of

SHAPE = [part for key, value in TINY.items() for part in ("--model-arg", f"{key}={value}")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt its colours, and its task file alone in another folder."""
    root = tmp_path_factory.mktemp("saved")
    write_task(root / "data")
    write_weights(root / "base.safetensors")
    model = ["-m", "vit_tiny_patch16_224", *SHAPE, "-w", str(root / "base.safetensors")]
    step = ["--epochs", "4", "--batch-size", "8", "--lr", "5e-3", "--method", "bias"]
    arguments = ["finetune", *model, "-d", str(root / "data"), "-o", str(root / "runs" / "bias")]
    assert run([*arguments, *step, "--quiet", "--json"]) == 0
    (root / "alone").mkdir()
    shutil.copy(root / "runs" / "bias" / "task.safetensors", root / "alone" / "my task.safetensors")
    return root


@pytest.fixture
def task(place: Path) -> str:
    return str(place / "alone" / "my task.safetensors")


def test_a_task_file_alone_is_evaluated_and_predicts(
    place: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = place / "runs" / "bias"
    of_run = json_of(["evaluate", str(run_folder), "-q"], capsys)
    assert of_run["accuracy"] > 0.9
    assert of_run["classes_are_the_models"] is True
    assert json_of(["evaluate", task, "-d", str(place / "data"), "-q"], capsys) == of_run
    for asked in ("red,green,blue", "blue,red,green"):
        data = ["-d", str(place / "data"), "--classes", asked]
        assert json_of(["evaluate", task, *data, "-q"], capsys) == of_run
    seen = json_of(["predict", task, str(place / "data" / "test"), "--top", "2", "-q"], capsys)
    assert len(seen["images"]) == 18
    right = sum(
        Path(one["image"]).parent.name == one["classes"][0]["class"] for one in seen["images"]
    )
    assert right == of_run["correct"]
    assert [len(one["classes"]) for one in seen["images"]] == [2] * 18


def test_other_classes_are_refused_before_any_accuracy(
    place: Path, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "other", {"bleu": 1, "rouge": 1, "vert": 1})
    said = complaint_of(["evaluate", task, "-d", str(tmp_path / "other")], capsys)
    assert "--data: the model does not know bleu, rouge, vert, only blue, green, red" in said
    data = ["-d", str(place / "data"), "--classes", "red,pink,blue"]
    assert "--classes: 'pink' is not among" in complaint_of(["evaluate", task, *data], capsys)
    assert "--data: name the folder" in complaint_of(["evaluate", task], capsys)


def test_the_confusion_is_told_and_drawn(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "confusion.png"
    arguments = ["evaluate", str(place / "runs" / "bias"), "-q"]
    text = output_of([*arguments, "--confusion", str(picture)], capsys)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert text.splitlines()[-1] == f"written to {picture}"
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["class", "accuracy", "images", "taken", "for"]
    value = json_of(arguments, capsys)
    assert [sum(row) for row in value["confusion"]] == [6, 6, 6]
    assert [row[i] for i, row in enumerate(value["confusion"])] == [
        one["correct"] for one in value["classes"].values()
    ]
    out = tmp_path / "pairs.csv"
    text = output_of([*arguments, "--csv", str(out)], capsys)
    assert text.splitlines()[-1] == f"written to {out}"
    names = list(value["classes"])
    for row in csv.DictReader(out.open()):
        label, chosen = names.index(row["class"]), names.index(row["taken for"])
        assert value["confusion"][label][chosen] == int(row["images"])
        value["confusion"][label][chosen] = 0
    assert not any(map(any, value["confusion"]))
    assert "--csv: " in complaint_of([*arguments, "--csv", str(out)], capsys)
    for name, words in (("x.txt", "expected a picture"), ("no/x.png", "no such folder")):
        bad = [*arguments, "--confusion", str(tmp_path / name)]
        assert f"--confusion: {words}" in complaint_of(bad, capsys)


def test_predictions_as_a_table_and_as_csv(
    place: Path, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red = place / "data" / "test" / "red"
    out = tmp_path / "seen.csv"
    text = output_of(["predict", task, str(red), "--csv", str(out), "-q"], capsys)
    assert text.count(".png") == 6
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 18
    assert rows[0]["image"] == str(red / "000.png")
    assert [row["class"] for row in rows if row["rank"] == "1"] == ["red"] * 6
    assert sum(float(row["probability"]) for row in rows[:3]) == pytest.approx(1, abs=1e-5)
    again = ["predict", task, str(red), "--csv", str(out)]
    assert "--csv: " in complaint_of(again, capsys)
    assert run([*again, "--top", "1", "--force", "-q"]) == 0
    assert len(list(csv.DictReader(out.open()))) == 6
    capsys.readouterr()
    for bad, words in (
        (["predict", task, str(tmp_path / "none")], "no such file or folder"),
        (["predict", task, str(red), "--top", "0"], "--top: expected at least 1"),
        (["predict", task, str(red), "--batch-size", "0"], "--batch-size: expected"),
        (["predict", task, str(red), "--image-size", "64"], "--image-size: this model takes 16"),
        (["predict", task, str(red), "--mean", "0", "--std", "1"], "--mean, --std: "),
        (["predict", str(place / "data"), str(red)], "no task.safetensors"),
        (["predict", task], "IMAGE"),
    ):
        assert words in complaint_of(bad, capsys)


def test_a_merged_file_tells_as_much(
    place: Path, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = tmp_path / "merged.safetensors"
    assert run(["merge", task, "-o", str(merged)]) == 0
    capsys.readouterr()
    before, after = (
        json_of(["evaluate", str(file), "-d", str(place / "data"), "-q"], capsys)
        for file in (task, merged)
    )
    assert after["confusion"] == before["confusion"]
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-4)
    said = complaint_of(["merge", task, "-o", str(tmp_path / "merged.ckpt")], capsys)
    assert "--output: expected a name that ends in" in said
    assert not (tmp_path / "merged.ckpt").exists()


def test_weights_that_have_moved_are_named(
    place: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base, moved = place / "base.safetensors", place / "moved.safetensors"
    base.rename(moved)
    try:
        data = ["-d", str(place / "data")]
        said = complaint_of(["evaluate", task, *data], capsys)
        assert "--weights: " in said
        assert "is not there" in said
        seen = json_of(["evaluate", task, *data, "-w", str(moved), "-q"], capsys)
        assert seen["accuracy"] > 0.9
    finally:
        moved.rename(base)


def test_inspect_tells_what_the_file_tells(
    place: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    value = json_of(["inspect", task], capsys)
    assert value["metadata"]["classes"] == ["blue", "green", "red"]
    assert value["metadata"]["model"]["name"] == "vit_tiny_patch16_224"
    text = output_of(["inspect", task], capsys)
    assert "blue, green, red" in text
    assert f"{task}," in text  # whole, though it is long and holds a space
    names = [row["name"] for row in value["tensors"]]
    places = [name.split(".")[1] for name in names if name.startswith("blocks.")]
    assert places == sorted(places)
    plan = json_of(["inspect", str(place / "runs" / "bias" / "plan.safetensors")], capsys)
    assert (plan["kind"], plan["structured"]) == ("plan", None)


def test_runs_are_compared(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = place / "runs" / "bias"
    for seed, accuracy in ((1, 0.5), (2, 1.0)):
        copy = tmp_path / "runs" / f"seed {seed}"
        copy.mkdir(parents=True)
        for name, part, change in (
            ("config.json", "job", {"recipe": {"seed": seed}}),
            ("result.json", None, {"test_accuracy": accuracy}),
        ):
            value = json.loads((one / name).read_text())
            if part is None:
                value |= change
            else:
                value[part]["recipe"] |= change["recipe"]
            (copy / name).write_text(json.dumps(value))
    picture = tmp_path / "all.png"
    text = output_of(["compare", str(tmp_path / "runs"), "-o", str(picture)], capsys)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "75.0 ± 25.0" in text
    assert "bias" in text
    value = json_of(["compare", str(tmp_path / "runs"), str(one)], capsys)
    (way,) = value["ways"]
    assert len(way["accuracies"]) == 3
    assert "RUN: no such folder" in complaint_of(["compare", str(tmp_path / "none")], capsys)
    bad = ["compare", str(one), "-o", str(tmp_path / "x.txt")]
    assert "--output: expected a picture" in complaint_of(bad, capsys)


def test_what_is_taken_for_what_takes_no_square_of_the_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 100,000 classes that was 80 GB, and of 1,000 a million places to look through."""
    monkeypatch.delattr(Accuracy, "confusion")
    n = 100_000
    labels, chosen = (5, 5, 5, 5, 5, 5, 7), (9, 2, 9, 3, 5, 1, 7)
    counts = ([0] * n, [0] * n)
    counts[0][5], counts[0][7], counts[1][5], counts[1][7] = 1, 1, 6, 1
    seen = Accuracy(2, 7, 0.0, tuple(counts[0]), tuple(counts[1]), chosen, labels)
    images = LabelledImages((), (), tuple(f"c{i}" for i in range(n)))
    shown = evaluate._table(seen, images)
    told = {row[0]: row[3].replace("\ue000", " ") for row in shown.rows if row[3]}
    assert told == {"c5": "c9 2, c1 1, c2 1, …"}
    value = evaluate._value(seen, images, is_known=True)
    assert value["confusion"] is None
    assert value["confused"][0] == {"class": "c5", "taken_for": "c9", "images": 2}
    assert [one["taken_for"] for one in value["confused"]] == ["c9", "c1", "c2", "c3"]
    rows = evaluate._csv(seen, images.classes).splitlines()
    assert rows[:2] == ["class,taken for,images", "c5,c9,2"]
    assert {"c5,c5,1", "c7,c7,1"} < set(rows)


def test_a_config_of_another_program_is_of_no_run(
    place: Path, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of transformers has one, too, and a task file may lie beside it."""
    config = tmp_path / "config.json"
    config.write_text('{"architectures": ["ViTForImageClassification"]}')
    data = ["-d", str(place / "data"), "-q"]
    of_run = json_of(["evaluate", task, *data], capsys)
    beside = shutil.copy(task, tmp_path / "task.safetensors")
    for file in (str(beside), str(tmp_path)):
        assert json_of(["evaluate", file, *data], capsys) == of_run
    folder, words = str(tmp_path), "(config.json is not there, or another's)"
    assert f"no run in this folder {words}" in complaint_of(["inspect", folder], capsys)
    assert f"holds no run {words}" in complaint_of(["compare", folder], capsys)
    assert "expected a finished run, found none" in complaint_of(["plot", "budget", folder], capsys)
    model = ["-m", "vit_tiny_patch16_224", *SHAPE, "-w", str(place / "base.safetensors")]
    for job in ([], [*model, *data]):
        resume = ["finetune", "--resume", "-o", folder, *job]
        assert "config.json is of another program, and of no run" in complaint_of(resume, capsys)
    assert "ViTForImageClassification" in config.read_text()
