"""Runs side by side: seeds are gathered, what differs is said, what is missing is named."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from spt_kernels.cli import app
from spt_kernels.finetuning import compare_runs, comparison_figure
from tests.pictures import assert_nothing_is_cut

JOB: dict[str, Any] = {
    "model": {"name": "vit", "args": {}, "weights": "w.safetensors", "pretrained": False},
    "images": {"root": "photos", "classes": []},
    "method": {"name": "spt-lora", "budget": None, "rank": None},
    "recipe": {"epochs": 10, "seed": 0},
    "form": {},
}
RESULT: dict[str, Any] = {
    "method": "spt-lora",
    "test_accuracy": 0.5,
    "val_accuracy": 0.4,
    "trained_parameters": 50,
    "backbone_parameters": 10_000,
    "accounted_peak_bytes": 1 << 20,
    "measured_peak_bytes": None,
    "task_bytes": 100,
    "seconds": 10.0,
}


def run(folder: Path, result: dict[str, Any] | None = None, **job: dict[str, Any]) -> Path:
    """A folder as a run leaves it: `job` changes parts of the job."""
    folder.mkdir(parents=True)
    made = {part: {**values, **job.get(part, {})} for part, values in JOB.items()}
    (folder / "config.json").write_text(json.dumps({"job": made}))
    if result is not None:
        full = {**RESULT, "method": made["method"]["name"], **result}
        (folder / "result.json").write_text(json.dumps(full))
    return folder


def test_seeds_are_one_row(tmp_path: Path) -> None:
    accuracies = (0.5, 0.6, 0.75)
    runs = [
        run(
            tmp_path / f"seed-{i}",
            {"test_accuracy": accuracy, "seconds": 10.0 + i, "task_bytes": 100 + i},
            recipe={"seed": i},
        )
        for i, accuracy in enumerate(accuracies)
    ]
    other = run(tmp_path / "lora", {"trained_parameters": 100}, method={"name": "lora"})
    made = compare_runs([*runs, other, runs[0]])  # named twice, it is one run
    first, second = made.ways
    assert (first.name, second.name) == ("spt-lora", "lora")
    assert first.runs == tuple(map(str, runs))
    assert first.mean == pytest.approx(0.616667, abs=1e-6)
    deviations = sum((accuracy - first.mean) ** 2 for accuracy in accuracies)  # type: ignore[operator]
    assert first.standard_error == pytest.approx(math.sqrt(deviations / 2 / 3))
    assert (first.seconds, first.file_bytes, first.trained_share) == (11.0, 102, 0.005)
    assert (second.mean, second.standard_error, second.trained_share) == (0.5, None, 0.01)
    assert (made.images, made.peak, dict(made.unlike), dict(made.missing)) == (
        *("test", "accounted"),
        *({}, {}),
    )
    value = made.to_json()
    assert json.loads(json.dumps(value)) == value
    assert [way["mean_accuracy"] for way in value["ways"]] == [first.mean, 0.5]


def test_runs_of_a_benchmark_are_found_in_its_folders(tmp_path: Path) -> None:
    for seed in range(2):
        run(tmp_path / "dtd" / "spt-lora" / f"seed{seed}", {}, recipe={"seed": seed})
    (tmp_path / "dtd" / "spt-lora" / "choice.json").write_text("{}")
    run(tmp_path / "dtd" / "spt-lora" / "choice" / "lr=0.1", {}, recipe={"lr": 0.1})
    run(tmp_path / "dtd" / "lora" / "seed0", {}, method={"name": "lora"})
    run(tmp_path / "dtd" / ".trash" / "old", {}, method={"name": "bias"})
    run(tmp_path / "dtd" / "lora" / "seed0" / "within", {}, method={"name": "full"})
    for folder in (tmp_path, tmp_path / "dtd"):
        made = compare_runs([folder])
        assert [(way.name, len(way.runs)) for way in made.ways] == [("lora", 1), ("spt-lora", 2)]
        assert not made.missing
    [chosen] = compare_runs([tmp_path / "dtd" / "spt-lora" / "choice"]).ways
    assert chosen.runs == (str(tmp_path / "dtd" / "spt-lora" / "choice" / "lr=0.1"),)


def test_a_row_says_what_tells_it_from_others_of_its_method(tmp_path: Path) -> None:
    run(tmp_path / "a", {}, method={"budget": 400_000})
    run(tmp_path / "b", {}, method={"budget": 0.01})
    run(tmp_path / "c", {}, method={"budget": 0.01}, recipe={"epochs": 20})
    run(tmp_path / "d", {}, method={"name": "full"}, recipe={"epochs": 30})
    (tmp_path / "notes").mkdir()
    assert [way.name for way in compare_runs([tmp_path]).ways] == [
        "spt-lora, budget 400,000, epochs 10",
        "spt-lora, budget 0.01, epochs 10",
        "spt-lora, budget 0.01, epochs 20",
        "full",
    ]


def test_what_is_not_comparable_is_said(tmp_path: Path) -> None:
    run(tmp_path / "a", {})
    run(tmp_path / "b", {}, images={"root": "others", "classes": ["x", "y"]})
    run(tmp_path / "c", None, method={"name": "full"})
    made = compare_runs([tmp_path])
    assert dict(made.unlike) == {
        "images.root": ("photos", "others"),
        "images.classes": ("all", "x,y"),
    }
    assert dict(made.missing) == {str(tmp_path / "c"): "it is not finished"}
    # of a method that was trained for longer, but not where the names of all rows say so
    long = run(tmp_path / "d", {}, method={"name": "full"}, recipe={"epochs": 30, "seed": 1})
    alone = run(tmp_path / "e", {}, recipe={"epochs": 30})
    assert dict(compare_runs([tmp_path / "a", long]).unlike) == {"recipe.epochs": ("10", "30")}
    assert dict(compare_runs([tmp_path / "a", alone]).unlike) == {}
    with pytest.raises(ValueError, match=r"runs: none is finished: .*c"):
        compare_runs([tmp_path / "c"])
    with pytest.raises(ValueError, match="no such folder"):
        compare_runs([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no run"):
        compare_runs([tmp_path / "a", tmp_path / "empty"])
    with pytest.raises(ValueError, match="at least one"):
        compare_runs([])


def test_validation_stands_in_where_no_run_was_tested(tmp_path: Path) -> None:
    one = run(tmp_path / "one", {"test_accuracy": None})
    made = compare_runs([one])
    assert (made.images, made.ways[0].mean) == ("validation", 0.4)
    two = run(tmp_path / "two", {}, method={"name": "lora"})
    made = compare_runs([one, two])  # never one with the other
    assert (made.images, [way.mean for way in made.ways]) == ("test", [None, 0.5])
    comparison_figure(made)


def test_peaks_are_measured_in_all_rows_or_in_none(tmp_path: Path) -> None:
    run(tmp_path / "card", {"measured_peak_bytes": 3 << 20})
    assert compare_runs([tmp_path]).peak == "measured"
    run(tmp_path / "cpu", {}, method={"name": "lora"})
    made = compare_runs([tmp_path])
    assert made.peak == "accounted"
    assert [way.peak_bytes for way in made.ways] == [1 << 20, 1 << 20]


def test_the_picture_holds_every_row(tmp_path: Path) -> None:
    for i, accuracy in enumerate((0.5, 0.6)):
        run(tmp_path / f"{i}", {"test_accuracy": accuracy}, recipe={"seed": i})
    run(tmp_path / "full", {"trained_parameters": 10_000}, method={"name": "full"})
    figure = comparison_figure(compare_runs([tmp_path]))
    accuracy, share, peak, time = figure.axes
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["spt-lora", "full"]
    assert accuracy.get_title(loc="left") == "test accuracy, %"
    assert [text.get_text() for text in share.texts] == ["0.500", "100"]
    assert [text.get_text() for text in peak.texts] == ["1.00", "1.00"]
    assert [text.get_text() for text in time.texts] == ["10.0", "10.0"]
    (rings,) = [c for c in accuracy.collections if len(c.get_offsets()) == 2]
    assert [x for x, _ in rings.get_offsets()] == [50, 60]
    figure.savefig(tmp_path / "x.png")


def test_names_of_many_lines_stay_apart_in_the_picture(tmp_path: Path) -> None:
    for i in range(3):
        weights = "/a/folder/of/a/long/name/" + f"for the base weights, {i}/$w.safetensors"
        args = {"depth": i, "embed_dim": i, "img_size": i, "num_heads": i, "patch_size": i}
        run(tmp_path / f"{i}", {}, model={"args": args, "weights": weights}, recipe={"epochs": i})
    figure = comparison_figure(compare_runs([tmp_path]))
    assert_nothing_is_cut(figure)
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_the_same_job_and_seed_counts_once(tmp_path: Path) -> None:
    """A copy of a run is no other seed: with it the standard error was 0."""
    first = run(tmp_path / "a", {})
    copy, other = run(tmp_path / "copy", {}), run(tmp_path / "b", {}, recipe={"seed": 1})
    made = compare_runs([first, copy, other])
    [way] = made.ways
    assert way.runs == (str(first), str(other))
    assert made.missing == {str(copy): f"it is of the same job and seed as {first}"}


def test_a_mean_over_some_of_the_runs_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "a", {}), run(tmp_path / "b", {"test_accuracy": None}, recipe={"seed": 1})
    assert app.run(["compare", str(tmp_path)]) == 0
    assert "spt-lora: 1 of its 2 runs have test images" in capsys.readouterr().out
