"""Runs whose files lack what is read of them: one error that names the file, from every reader."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spt_kernels.benchmarks import benchmark_table
from spt_kernels.benchmarks.cell import Cell, read_candidate, read_choice
from spt_kernels.finetuning import FinetuneJob, ImageSource, ModelSource, compare_runs
from spt_kernels.finetuning.folder.run_folder import RunFolder
from spt_kernels.finetuning.run.run import finished_in
from spt_kernels.plots.runs import read_runs
from tests.benchmarks.test_table import ACCURACIES
from tests.benchmarks.test_table import write as write_benchmark
from tests.plots.made_up import run as write_run

from .test_commands import complaint_of

JOB = FinetuneJob(ModelSource("vit", weights="w.safetensors"), ImageSource("photos"))
LACKS = ({}, {"seconds": 1.0})


@pytest.mark.parametrize("result", LACKS)
@pytest.mark.parametrize(
    "read",
    [
        lambda folder: compare_runs([folder]),
        lambda folder: read_runs([folder]),
        lambda folder: finished_in(RunFolder(folder), JOB, "epochs"),
    ],
    ids=["compare", "plot", "resume"],
)
def test_a_result_that_lacks_what_is_read(
    tmp_path: Path, read: Callable[[Path], Any], result: dict[str, Any]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"job": JOB.to_json()}))
    (folder / "result.json").write_text(json.dumps(result))
    got = "seconds" if result else "nothing"
    with pytest.raises(ValueError, match=rf"run/result\.json: expected '\w+' in it, got {got}"):
        read(folder)


@pytest.mark.parametrize(
    ("file", "keys", "value", "said"),
    [
        ("result", "test_accuracy", "0.9", 'a number from 0 to 1, or null, got "0.9"'),
        ("result", "test_accuracy", 1.5, "a number from 0 to 1, or null, got 1.5"),
        ("result", "test_accuracy", math.nan, "a number from 0 to 1, or null, got NaN"),
        ("result", "trained_parameters", -3, "a whole number of 0 or more, got -3"),
        ("result", "backbone_parameters", 0, "a whole number above 0, got 0"),
        ("result", "seconds", [1], r"a number of 0 or more, got \[1\]"),
        ("config", "job.model", ["vit"], r'an object, got \["vit"\]'),
        ("config", "job.method", None, "an object, got null"),
        ("config", "job.method.name", {"a": 1}, r'a string, got \{"a": 1\}'),
        ("config", "job.recipe.seed", True, "a whole number of 0 or more, got true"),
    ],
)
def test_a_value_of_another_kind(
    tmp_path: Path, file: str, keys: str, value: Any, said: str, capsys: Any
) -> None:
    folder = write_run(tmp_path / "run", 0.5)
    path = folder / f"{file}.json"
    held = json.loads(path.read_text())
    place = held
    *way, last = keys.split(".")
    for key in way:
        place = place.setdefault(key, {})
    place[last] = value
    path.write_text(json.dumps(held))
    said = rf"run/{file}\.json: {keys}: expected {said}"
    for read in (compare_runs, read_runs):
        with pytest.raises(ValueError, match=said):
            read([folder])
    assert re.search(said, complaint_of(["inspect", str(folder)], capsys))


def test_a_job_with_a_value_that_none_has(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 0.5)
    job = {**JOB.to_json(), "recipe": {**JOB.to_json()["recipe"], "epochs": -1}}
    (folder / "config.json").write_text(json.dumps({"job": job}))
    said = r"run/config\.json: the job in it: epochs: expected more than zero, got -1"
    with pytest.raises(ValueError, match=said):
        finished_in(RunFolder(folder), JOB, "epochs")


def test_inspect_of_a_result_that_lacks_what_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"job": JOB.to_json(), "classes": ["a", "b"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "result.json").write_text("{}")
    said = complaint_of(["inspect", str(tmp_path)], capsys)
    assert "result.json: expected 'test_accuracy' in it, got nothing" in said


def test_a_config_that_lacks_what_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 0.5)
    (folder / "config.json").write_text('{"job": {}}')
    said = r"run/config\.json: expected '\w+' in it, got nothing"
    for read in (compare_runs, read_runs):
        with pytest.raises(ValueError, match=said):
            read([folder])
    job = {**JOB.to_json(), "recipe": {"of another version": 1}}
    (folder / "config.json").write_text(json.dumps({"job": job}))
    with pytest.raises(ValueError, match=r"run/config\.json: the job in it is not of this version"):
        finished_in(RunFolder(folder), JOB, "epochs")


@pytest.mark.parametrize("result", LACKS)
def test_a_cell_of_a_benchmark_that_lacks_what_is_read(
    tmp_path: Path, result: dict[str, Any]
) -> None:
    output = write_benchmark(tmp_path / "x", ACCURACIES)
    cell = Cell("a", "full", 0)
    (output / cell.folder / "result.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"a/full/seed0/result\.json: expected 'test_accuracy'"):
        benchmark_table(output)


def test_what_lies_beside_the_cells_of_a_benchmark(tmp_path: Path) -> None:
    output = write_benchmark(tmp_path / "x", ACCURACIES)
    cell = Cell("a", "full", 0)
    candidate = output / "a" / "full" / "choice" / "lr=0.1"
    candidate.mkdir(parents=True)
    (candidate / "result.json").write_text("{}")
    with pytest.raises(ValueError, match=r"lr=0\.1/result\.json: expected 'val_accuracy'"):
        read_candidate(output, cell, {"lr": 0.1})
    (output / "a" / "full" / "choice.json").write_text('{"chosen"')
    with pytest.raises(ValueError, match=r"full/choice\.json: not JSON"):
        read_choice(output / "a" / "full")
    (output / "a" / "full" / "choice.json").write_text("{}")
    with pytest.raises(ValueError, match=r"full/choice\.json: expected 'chosen' in it"):
        benchmark_table(output)
    (output / "a" / "full" / "choice.json").unlink()
    (output / cell.folder / "result.json").unlink()
    (output / cell.folder / "failed.json").write_text("{}")
    with pytest.raises(ValueError, match=r"seed0/failed\.json: expected 'reason' in it"):
        benchmark_table(output)
    (output / "benchmark.json").write_text("{")
    with pytest.raises(ValueError, match=r"benchmark\.json: not JSON"):
        benchmark_table(output)


@pytest.mark.parametrize("command", ["finetune", "segment"])
def test_a_bare_resume_of_a_job_of_another_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    kind = {"segment": {"kind": "segmentation"}}.get(command, {})
    job = {**JOB.to_json(), "model": {"of another version": 1}}
    (tmp_path / "config.json").write_text(json.dumps({"job": job, **kind}))
    said = complaint_of([command, "--resume", "-o", str(tmp_path)], capsys)
    assert "config.json: the job in it is not of this version" in said
