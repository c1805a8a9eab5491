"""A whole grid: what is run, what is not run again, what fails alone, when test images are read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spt_kernels.benchmarks import BenchmarkSetting, BenchmarkTable, Place, benchmark_table
from spt_kernels.benchmarks import run_benchmark as run
from spt_kernels.benchmarks.lock import only_one
from spt_kernels.benchmarks.piece import cells_of, unfinished
from spt_kernels.benchmarks.processes import Processes
from spt_kernels.finetuning import FinetuneJob, Method, ModelSource, finetune
from spt_kernels.finetuning.images import pixels
from spt_kernels.finetuning.progress import Silent
from spt_kernels.methods.noah_architecture import NoahArchitecture


class Heard(Silent):
    """Keeps the lines, and stops at the one that has `at` in it."""

    def __init__(self, at: str | None = None) -> None:
        self.at = at
        self.lines: list[str] = []
        self.stages: list[tuple[str, int]] = []

    def start(self, stage: str, total: int) -> None:
        self.stages.append((stage, total))

    def say(self, message: str) -> None:
        self.lines.append(message)
        if self.at is not None and self.at in message:
            raise KeyboardInterrupt


def accuracies(table: BenchmarkTable) -> dict[str, Any]:
    """All figures, without what the time of day decides."""
    return {row["method"]: row for row in table.to_json()["rows"]}


@pytest.fixture(scope="module")
def whole(place: Path, setting: BenchmarkSetting) -> Path:
    """The folder of a grid that was run without a stop, in which reading of images was counted."""
    output = place / "whole"
    seen: Counter[str] = Counter()
    open_image = pixels.Image.open

    def counting(path: Any, *args: Any, **options: Any) -> Any:
        seen[str(path)] += 1
        return open_image(path, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels.Image, "open", counting)
        run(setting, output, jobs=0)
    (output / "seen.txt").write_text(json.dumps(seen))
    return output


def test_every_cell_is_run_and_its_figures_are_in_the_table(
    whole: Path, setting: BenchmarkSetting
) -> None:
    table = benchmark_table(whole)
    assert (table.n_missing, dict(table.failed)) == (0, {})
    assert [row.method for row in table.rows] == ["linear", "spt-unstructured"]
    for row in table.rows:
        for task in setting.tasks:
            own = [whole / task.name / row.method / f"seed{seed}" for seed in (0, 1)]
            results = [json.loads((folder / "result.json").read_text()) for folder in own]
            seen = dict(enumerate(result["test_accuracy"] for result in results))
            assert dict(row.tasks[task.name].by_seed) == seen
            assert all((folder / "task.safetensors").is_file() for folder in own)
            assert not any((folder / "state.pt").is_file() for folder in own)
    assert table.rows[1].trained_parameters == 400


def test_test_images_are_looked_at_once_for_each_run(
    whole: Path, setting: BenchmarkSetting
) -> None:
    """They are opened twice: before that it is seen whether they can be read."""
    seen = json.loads((whole / "seen.txt").read_text())
    of_test = {path: n for path, n in seen.items() if "/test/" in path}
    assert len(of_test) == 3 * (3 + 4)
    assert set(of_test.values()) == {2 * len(setting.methods) * len(setting.seeds)}


def test_a_finished_grid_is_read_and_not_run(whole: Path, setting: BenchmarkSetting) -> None:
    left = whole / setting.tasks[0].name / "linear" / "seed0" / "state.pt"
    left.touch()  # as if it had been killed before it removed that
    heard = Heard()
    again = run(setting, whole, jobs=0, progress=heard)
    assert not left.exists()
    assert accuracies(again) == accuracies(benchmark_table(whole))
    assert heard.lines == ["8 of 8 runs are finished already"]
    assert heard.stages == []


def test_a_run_of_the_grid_is_the_run_that_finetune_would_make(
    whole: Path, tmp_path: Path, setting: BenchmarkSetting
) -> None:
    task = setting.tasks[0]
    for method in setting.methods:
        recipe = replace(setting.recipe, seed=1)
        finetune(FinetuneJob(setting.model, task.final, method, recipe), tmp_path / method.name)
        own = whole / task.name / method.name / "seed1"
        for file in ("task.safetensors", "predictions.jsonl"):
            assert (own / file).read_bytes() == (tmp_path / method.name / file).read_bytes()


def test_methods_of_a_task_and_seed_share_what_was_measured(
    place: Path, tmp_path: Path, setting: BenchmarkSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spt_kernels.finetuning.preparation import stages as preparation

    measured = []
    measure = preparation.sensitivity_of

    def counting(own: Any, *args: Any) -> Any:
        measured.append(own.job.method.name)
        return measure(own, *args)

    monkeypatch.setattr(preparation, "sensitivity_of", counting)
    methods = (Method("spt-unstructured", 400, samples=12), Method("spt-lora", 400, 2, samples=12))
    one = replace(setting, tasks=setting.tasks[:1], seeds=(0,))
    run(replace(one, methods=methods), tmp_path / "shared", jobs=0)
    assert measured == ["spt-unstructured"]
    run(replace(one, methods=methods[1:]), tmp_path / "alone", jobs=0)
    assert measured == ["spt-unstructured", "spt-lora"]
    files = [
        tmp_path / which / one.tasks[0].name / "spt-lora" / "seed0" / "task.safetensors"
        for which in ("shared", "alone")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    other = replace(methods[1], samples=10)
    run(replace(one, methods=(other,)), tmp_path / "other", jobs=0)
    assert measured[2:] == ["spt-lora"], "of other samples, it is another"


def test_a_grid_that_was_stopped_goes_on_to_the_same_table(
    whole: Path, place: Path, setting: BenchmarkSetting
) -> None:
    output = place / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run(setting, output, jobs=0, progress=Heard("1/8  "))
    piece = unfinished(setting, output, cells_of(setting))[-1]
    with Processes(output, [Place("cpu")]) as processes:  # in a real process of its own
        processes.begin(piece)
        note = processes.wait()
        assert note.piece is piece
        assert note.note.endswith(" %")
        # who asks is gone, as after a SIGKILL: it ends at once, in the middle of the run
        (process,) = processes._processes.values()
        process._process.stdin.close()
        while (report := processes.wait()).note:
            pass
        assert report.failure is not None
        assert "its process ended with code 0" in report.failure.reason
    heard = Heard()
    table = run(setting, output, jobs=0, progress=heard)
    assert heard.lines[0] == "1 of 8 runs are finished already"
    assert heard.stages == [("benchmark", 7)]
    assert accuracies(table) == accuracies(benchmark_table(whole))


def test_a_method_that_fails_stops_no_other(tmp_path: Path, setting: BenchmarkSetting) -> None:
    bad = Method("spt-unstructured", 10**9)
    some = replace(setting, methods=(bad, Method("linear")), seeds=(0,))
    heard = Heard()
    table = run(some, tmp_path / "grid", jobs=0, progress=heard)
    assert table.n_missing == len(table.failed) == 2
    assert (
        "budget=1,000,000,000 is more than can be spent"
        in table.failed["blues, spt-unstructured, seed 0"]
    )
    assert table.rows[0].mean.mean is None
    assert table.rows[1].mean.mean is not None
    assert sum("failed: budget=1,000" in line for line in heard.lines) == 2
    kept = json.loads((tmp_path / "grid/blues/spt-unstructured/seed0/failed.json").read_text())
    assert "Traceback" in kept["trace"]
    again = run(some, tmp_path / "grid", jobs=0, progress=(heard := Heard()))
    assert heard.stages == [("benchmark", 2)], "failed ones are tried again, finished ones are not"
    assert again.failed == table.failed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": {"epochs": 2}}, r"recipe\.epochs was 1, is 2"),
        ({"methods": {"budget": 300}}, "budget of spt-unstructured was 400, is 300"),
        ({"choices": {"lr": (1e-3, 1e-2)}}, r"choices\.lr was None, is"),
        ({"form": {"fit": "crop"}}, r"form\.fit was None, is crop"),
        ({"model": {"new_head": True}}, r"model\.new_head was False, is True"),
        ({"tasks": {"val_share": 0.3}}, "val_share of blues, choose was 0.1, is 0.3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_setting_is_refused_and_named(
    change: dict[str, Any], words: str, whole: Path, setting: BenchmarkSetting
) -> None:
    ((name, own),) = change.items()
    if name == "methods":
        value: Any = (setting.methods[0], replace(setting.methods[1], **own))
    elif name == "tasks":
        task = setting.tasks[0]
        value = (replace(task, choose=replace(task.choose, **own)), *setting.tasks[1:])
    else:
        old = getattr(setting, name)
        value = {**old, **own} if isinstance(old, dict) else replace(old, **own)
    before = (whole / "benchmark.json").read_bytes()
    with pytest.raises(ValueError, match=f"output: .* is of another benchmark .*{words}"):
        run(replace(setting, **{name: value}), whole, jobs=0)
    assert (whole / "benchmark.json").read_bytes() == before


def test_a_file_that_holds_other_weights_now_is_refused(
    whole: Path, setting: BenchmarkSetting, base: ModelSource
) -> None:
    file = Path(base.weights or "")
    before, table = file.read_bytes(), benchmark_table(whole)
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        with pytest.raises(ValueError, match=r"weights: the runs in .* began with other values"):
            run(replace(setting, seeds=(0, 1, 2)), whole, jobs=0)
    finally:
        file.write_bytes(before)
    assert benchmark_table(whole) == table


def test_methods_tasks_and_seeds_are_added(tmp_path: Path, setting: BenchmarkSetting) -> None:
    small = replace(setting, tasks=setting.tasks[:1], methods=setting.methods[:1], seeds=(1,))
    run(small, tmp_path, jobs=0)
    heard = Heard()
    table = run(
        replace(small, tasks=setting.tasks[1:], seeds=(0,)), tmp_path, jobs=0, progress=heard
    )
    assert heard.stages == [("benchmark", 1)], "what is asked for, and no other"
    assert [task.name for task in table.tasks] == ["blues", "reds"]
    assert table.seeds == (1, 0)
    assert table.n_missing == 2
    (row,) = table.rows
    assert [len(figure.by_seed) for figure in row.tasks.values()] == [1, 1]
    assert row.mean.mean is None, "no seed is there for both"


def test_what_a_method_searches_for_is_searched_for_once_without_the_test_images(
    tmp_path: Path, setting: BenchmarkSetting
) -> None:
    method = Method("noah", 900, supernet_epochs=1, generations=1, population=2)
    table = run(replace(setting, methods=(method,), tasks=setting.tasks[:1]), tmp_path, jobs=0)
    assert (table.n_missing, dict(table.failed)) == (0, {})
    folder = tmp_path / setting.tasks[0].name / "noah"
    search = json.loads((folder / "choice" / "search" / "config.json").read_text())["job"]
    assert not search["images"]["use_test"]
    found = NoahArchitecture.load(folder / "choice" / "search" / "architecture.json")
    for seed in (0, 1):
        own = folder / f"seed{seed}"
        job = FinetuneJob.from_json(json.loads((own / "config.json").read_text())["job"])
        assert job.method == replace(method, architecture=found)
        assert not {"supernet.pt", "search.jsonl"} & {path.name for path in own.iterdir()}
    assert table.rows[0].trained_parameters <= 900


def test_what_every_run_would_fail_of_is_told_once(
    tmp_path: Path, setting: BenchmarkSetting, base: ModelSource
) -> None:
    for model, words in (
        (replace(base, weights=str(tmp_path / "none")), "weights: no such file"),
        (replace(base, name="vit_tinny"), "vit_tinny"),
    ):
        with pytest.raises(ValueError, match=words):
            run(replace(setting, model=model), tmp_path / "grid", jobs=0)
    for options, words in (
        ({"devices": ("cuda:77",)}, "cuda:77 is not here"),
        ({"devices": ("cpu", "cpu")}, "devices: one is named twice"),
        ({"devices": ()}, "devices: expected at least one"),
        ({"jobs": -1}, "jobs: expected 0 or more"),
        ({"workers": -1}, "workers: expected 0 or more"),
    ):
        with pytest.raises(ValueError, match=words):
            run(setting, tmp_path / "grid", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "grid").exists()


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path, setting: BenchmarkSetting) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not empty, and holds no benchmark"):
        run(setting, tmp_path, jobs=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_at_once_are_one_too_many(whole: Path, setting: BenchmarkSetting) -> None:
    with only_one(whole), pytest.raises(ValueError, match=r"output: process \d+ on .* is at work"):
        run(setting, whole, jobs=0)
    assert run(setting, whole, jobs=0).n_missing == 0


@pytest.mark.gpu
def test_every_card_has_a_process(tmp_path: Path, setting: BenchmarkSetting) -> None:
    table = run(replace(setting, seeds=(0,)), tmp_path, devices=("all",))
    assert (table.n_missing, dict(table.failed)) == (0, {})
    assert not any("CPU" in machine for machine in table.machines)
    for file in tmp_path.glob("*/*/seed0/result.json"):
        assert json.loads(file.read_text())["measured_peak_bytes"] > 0
