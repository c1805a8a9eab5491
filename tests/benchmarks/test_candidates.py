"""What is chosen is chosen on validation images, for all seeds at once; test images stay unread."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spt_kernels.benchmarks import BenchmarkSetting, Cell, benchmark_table, run_benchmark, run_cell
from spt_kernels.benchmarks import cell as cells
from spt_kernels.benchmarks.candidates import candidates_of, checked
from spt_kernels.benchmarks.table_text import notes
from spt_kernels.finetuning import Method
from spt_kernels.finetuning.images import pixels
from spt_kernels.finetuning.progress import Silent

LR = {"lr": (1e-4, 3e-2)}


def test_a_method_has_the_combinations_of_what_it_reads() -> None:
    choices = checked({"rank": [4, 8], "lr": [1e-3, 5e-4]})
    assert candidates_of(choices, Method("lora")) == [
        {"rank": 4, "lr": 1e-3},
        {"rank": 4, "lr": 5e-4},
        {"rank": 8, "lr": 1e-3},
        {"rank": 8, "lr": 5e-4},
    ]
    assert candidates_of(choices, Method("bias")) == [{"lr": 1e-3}, {"lr": 5e-4}]
    assert candidates_of({"rank": (4, 8)}, Method("bias")) == []
    assert candidates_of({}, Method("lora")) == []
    assert candidates_of({}, Method("noah")) == [{}], "where it searches"
    assert len(candidates_of(choices, Method("noah"))) == 2


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"seed": (0, 1)}, "expected one of budget, rank, .*, got 'seed'"),
        ({"lr": (1e-3,)}, "two or more values of lr, got 0.001"),
        ({"lr": ()}, "two or more values of lr, got none"),
        ({"lr": (1e-3, 1e-3, 1e-2)}, "two or more values of lr"),
        ({"lr": (1e-3, -1.0)}, "lr: expected more than zero"),
        ({"budget": (400, 1.5)}, "budget: expected a whole number"),
    ],
)
def test_what_cannot_be_chosen_is_refused(
    choices: Mapping[str, Any], words: str, setting: BenchmarkSetting
) -> None:
    with pytest.raises(ValueError, match=words):
        replace(setting, choices=choices)


class Reading(Silent):
    """Knows at each stage which images were opened since the benchmark began."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.lines: list[tuple[str, int]] = []

    def say(self, message: str) -> None:
        self.lines.append((message, sum("/test/" in path for path in self.opened)))


def test_the_best_on_validation_images_is_run_for_every_seed(
    tmp_path: Path, setting: BenchmarkSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = Reading()
    open_image = pixels.Image.open

    def noting(path: Any, *args: Any, **options: Any) -> Any:
        reading.opened.append(str(path))
        return open_image(path, *args, **options)

    monkeypatch.setattr(pixels.Image, "open", noting)
    linear = replace(setting, tasks=setting.tasks[:1], methods=setting.methods[:1], choices=LR)
    table = run_benchmark(linear, tmp_path, jobs=0, progress=reading)
    folder = tmp_path / "blues" / "linear"
    seen = {}
    for lr in LR["lr"]:
        own = folder / "choice" / f"lr={lr}"
        config = json.loads((own / "config.json").read_text())["job"]
        assert (config["recipe"]["lr"], config["recipe"]["seed"]) == (lr, 0)
        assert config["images"]["use_test"] is False
        result = json.loads((own / "result.json").read_text())
        assert result["test_accuracy"] is None
        assert set(result["images"]) == {"train", "val"}
        seen[lr] = result["val_accuracy"]
        assert {p.name for p in own.iterdir()} <= cells._OF_CANDIDATE
    best = max(seen, key=lambda lr: seen[lr])
    made = json.loads((folder / "choice.json").read_text())
    assert made["chosen"] == {"lr": best}
    assert [(c["options"]["lr"], c["val_accuracy"]) for c in made["candidates"]] == [*seen.items()]
    for seed in (0, 1):
        assert json.loads((folder / f"seed{seed}" / "result.json").read_text())["lr"] == best
    assert dict(table.rows[0].chosen) == {"blues": {"lr": best}}
    assert f"linear, chosen on validation images: lr {best} on blues" in notes(table)
    # both candidates are told before any test image is opened; then each run opens each twice, to
    # know before the training that it can be read, and to test
    assert [n for _, n in reading.lines] == [0, 0, 24, 48]
    assert [line.partition(":")[0] for line, _ in reading.lines] == [
        "1/4  blues, linear with lr=0.0001",
        "2/4  blues, linear with lr=0.03",
        "3/4  blues, linear, seed 0",
        "4/4  blues, linear, seed 1",
    ]
    more = Reading()
    run_benchmark(replace(linear, seeds=(2,)), tmp_path, jobs=0, progress=more)
    assert [line.partition(":")[0] for line, _ in more.lines] == ["1/1  blues, linear, seed 2"]


def accuracies(monkeypatch: pytest.MonkeyPatch, by_lr: Mapping[float, float | None]) -> list[Any]:
    """Let candidates have these accuracies, `None` for one that diverges; the jobs that are run."""
    jobs: list[Any] = []

    def pretended(job: Any, folder: Any, *args: Any) -> dict[str, Any]:
        jobs.append(job)
        accuracy = by_lr[job.recipe.lr]
        folder.path.mkdir(parents=True)
        folder["checkpoint"].write_bytes(b"large")
        if accuracy is None:
            raise FloatingPointError("the loss is nan")
        result = {
            **{"test_accuracy": 0.5, "val_accuracy": accuracy, "seconds": 1.0},
            **{"trained_parameters": 1, "backbone_parameters": 10},
            **{"device": "cpu", "threads": 1, "versions": {}},
        }
        folder.write_json("result", result)
        return result

    monkeypatch.setattr(cells, "_run", pretended)
    return jobs


@pytest.mark.parametrize(
    ("by_lr", "best"),
    [
        ({1e-4: 0.5, 1e-3: 0.75, 1e-2: 0.6}, 1e-3),
        ({1e-4: 0.5, 1e-3: 0.5, 1e-2: 0.4}, 1e-4),  # among equals the first
        ({1e-4: 0.0, 1e-3: None, 1e-2: None}, 1e-4),  # what diverges is the worst
    ],
)
def test_the_choice_by_hand(
    by_lr: Mapping[float, float | None],
    best: float,
    tmp_path: Path,
    setting: BenchmarkSetting,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs = accuracies(monkeypatch, by_lr)
    some = replace(setting, choices={"lr": tuple(by_lr)})
    done = run_cell(some, Cell("reds", "linear", 1), tmp_path)
    assert done.chosen == {"lr": best}
    assert [(job.recipe.lr, job.recipe.seed) for job in jobs] == [
        *((lr, 0) for lr in by_lr),
        (best, 1),
    ]
    for lr in by_lr:  # of no more use
        left = {p.name for p in (tmp_path / "reds" / "linear" / "choice" / f"lr={lr}").iterdir()}
        assert left == {"result.json" if by_lr[lr] is not None else "diverged.json"}
    assert jobs[0].images == setting.task("reds").choose
    assert jobs[-1].images == setting.task("reds").final
    assert run_cell(some, Cell("reds", "linear", 1), tmp_path) == done
    run_cell(some, Cell("reds", "linear", 0), tmp_path)
    assert len(jobs) == len(by_lr) + 2


def test_candidates_that_all_diverge_are_a_failure_of_their_cells(
    tmp_path: Path, setting: BenchmarkSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies(monkeypatch, {1e-4: None, 1e-3: None})
    some = replace(setting, choices={"lr": (1e-4, 1e-3)}, methods=setting.methods[:1], seeds=(0,))
    table = run_benchmark(some, tmp_path, jobs=0)
    reason = "the loss is not finite with lr=0.0001 nor lr=0.001"
    assert table.failed == {f"{task}, linear, seed 0": reason for task in ("blues", "reds")}
    assert benchmark_table(tmp_path).failed == table.failed


def test_a_task_without_validation_images_cannot_choose(
    tmp_path: Path, setting: BenchmarkSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = setting.tasks[0]
    blind = replace(task, choose=replace(task.choose, val_share=0.0))
    some = replace(setting, tasks=(blind,), methods=setting.methods[:1], seeds=(0,), choices=LR)
    table = run_benchmark(some, tmp_path, jobs=0)
    (reason,) = table.failed.values()
    assert "blues, linear with lr=0.0001: choices: task 'blues' has no validation images" in reason
