"""Accuracies by method and setting are means over tasks and seeds, and of like with like."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from spt_kernels.benchmarks.vtab import VTAB
from spt_kernels.plots import accuracy_by_budget, read_runs, samples_ablation, structure_ablation
from spt_kernels.plots.accuracy import labels
from spt_kernels.plots.numbers import csv_of

from .made_up import BACKBONE, run


def test_means_over_tasks_and_seeds(tmp_path: Path) -> None:
    """A benchmark's folders: two tasks, two seeds, two budgets of one method and a LoRA."""
    values = {("x", 0): 0.5, ("x", 1): 0.6, ("y", 0): 0.7, ("y", 1): 0.9}
    for (task, seed), accuracy in values.items():
        at = tmp_path / task
        run(at / "spt-lora" / f"seed{seed}", accuracy, seed=seed, budget=50, images=task)
        run(at / "large" / f"seed{seed}", accuracy + 0.05, seed=seed, budget=80, trained=80)
        run(at / "lora-8" / f"seed{seed}", 0.4, "lora-8", seed=seed, trained=90 + seed)
    made = accuracy_by_budget(read_runs([tmp_path]).runs)
    assert (made.tasks, made.images, made.backbone) == (("x", "y"), "test", BACKBONE)
    lora, small, large = made.each
    assert small.tasks == pytest.approx({"x": 0.55, "y": 0.8})
    assert small.seeds == pytest.approx({0: 0.6, 1: 0.75})
    assert small.mean == pytest.approx(0.675)
    assert small.standard_error == pytest.approx(0.075 * math.sqrt(2) / math.sqrt(2))
    assert (small.trained, small.structured, small.unstructured) == (50, 30, 20)
    assert large.mean == pytest.approx(0.725)
    assert (lora.family, lora.trained, lora.standard_error) == ("lora-K", 90.5, 0)
    assert labels(made.each) == ["lora-8", "spt-lora, budget 50", "spt-lora, budget 80"]
    assert json.loads(json.dumps(made.to_json())) == made.to_json()
    header, *lines = csv_of(made).splitlines()
    assert header.startswith("method,budget,rank,samples,rule,trained_parameters")
    assert header.endswith("accuracy of x,accuracy of y")
    assert len(lines) == 3


def test_groups_of_tasks_count_alike(tmp_path: Path) -> None:
    """As in VTAB-1k: the mean of the groups' means."""
    for task, accuracy in (("x", 0.2), ("y", 0.4), ("z", 0.9)):
        run(tmp_path / task / "spt-lora" / "seed0", accuracy)
    runs = read_runs([tmp_path]).runs
    assert accuracy_by_budget(runs).each[0].mean == pytest.approx(0.5)
    grouped = accuracy_by_budget(runs, {"x": "natural", "y": "natural", "z": "structured"})
    assert grouped.each[0].mean == pytest.approx(0.6)
    with pytest.raises(ValueError, match="groups: expected one for every task, got none for y, z"):
        accuracy_by_budget(runs, {"x": "natural"})


def test_all_of_vtab_is_the_mean_of_its_groups(tmp_path: Path) -> None:
    accuracy = {"Natural": 0.8, "Specialized": 0.6, "Structured": 0.4}
    for task, known in VTAB.items():
        run(tmp_path / task / "spt-lora" / "seed0", accuracy[known.group])
    assert accuracy_by_budget(read_runs([tmp_path]).runs).each[0].mean == pytest.approx(0.6)
    some = [tmp_path / task for task in ("cifar", "svhn", "kitti")]
    assert accuracy_by_budget(read_runs(some).runs).each[0].mean == pytest.approx(2 / 3)


def test_a_seed_that_lacks_a_task_is_left_out_and_named(tmp_path: Path) -> None:
    for task, seed in (("x", 0), ("y", 0), ("x", 1)):
        run(tmp_path / task / "spt-lora" / f"seed{seed}", 0.5 + seed / 4, seed=seed)
    run(tmp_path / "y" / "spt-lora" / "seed1", None, seed=1)
    run(tmp_path / "x" / "linear" / "seed0", 0.1, "linear")
    found = read_runs([tmp_path])
    assert found.unfinished == (str(tmp_path / "y" / "spt-lora" / "seed1"),)
    made = accuracy_by_budget(found.runs)
    assert [(row.method, row.mean, tuple(row.seeds)) for row in made.each] == [
        ("spt-lora", 0.5, (0,))
    ]
    assert made.missing == (
        "linear, seed 0, is left out: no test accuracy of y",
        "spt-lora, seed 1, is left out: no test accuracy of y",
    )
    with pytest.raises(ValueError, match="no method has a run on every task: linear, seed 0"):
        accuracy_by_budget([r for r in found.runs if (r.method, r.task) != ("spt-lora", "x")])


def test_a_rank_that_was_chosen_for_each_task_is_one_row(tmp_path: Path) -> None:
    """As `benchmark --choose rank=4,8` leaves its folder: each task has its own."""
    for task, rank, accuracy in (("x", 4, 0.5), ("y", 8, 0.7)):
        method = tmp_path / task / "spt-lora"
        run(method / "seed0", accuracy, trained=10 * rank, rank=rank)
        run(method / "choice" / f"rank={rank}", 0.9, rank=rank)  # tried on validation images
        choice = {"candidates": [], "chosen": {"rank": rank, "lr": 0.1}}
        (method / "choice.json").write_text(json.dumps(choice))
        run(tmp_path / task / "lora-8" / "seed0", 0.4, "lora-8", trained=30)
    made = accuracy_by_budget(read_runs([tmp_path]).runs)
    rows = [(row.method, row.settings["rank"], row.mean, row.trained) for row in made.each]
    assert rows == [("lora-8", None, 0.4, 30), ("spt-lora", "chosen", pytest.approx(0.6), 60)]
    assert labels(made.each) == ["lora-8", "spt-lora, rank chosen"]
    assert made.missing == ()


def test_what_cannot_be_one_picture_is_told(tmp_path: Path) -> None:
    first = run(tmp_path / "a", 0.5)
    second = run(tmp_path / "b", 0.6)
    with pytest.raises(
        ValueError, match=r"two runs of spt-lora on photos with seed 0: .*a and .*b"
    ):
        accuracy_by_budget(read_runs([first, second]).runs)
    other = run(tmp_path / "c", 0.6, model="swin", seed=1)
    with pytest.raises(ValueError, match="runs of one model, got swin, vit"):
        accuracy_by_budget(read_runs([first, other]).runs)
    small = run(tmp_path / "d", 0.6, args={"depth": 6}, seed=1)
    with pytest.raises(ValueError, match=r"runs of one model, got vit, vit \(depth=6\)"):
        accuracy_by_budget(read_runs([first, small]).runs)
    with pytest.raises(ValueError, match="at least one run, got none"):
        accuracy_by_budget([])
    with pytest.raises(ValueError, match=r"two or more of .*spt-unstructured, got spt-lora$"):
        structure_ablation(read_runs([first]).runs)
    with pytest.raises(ValueError, match="two or more numbers of samples, got 800"):
        samples_ablation(read_runs([first]).runs)


def test_structure_is_of_sensitivity_aware_methods(tmp_path: Path) -> None:
    names = ("lora-8", "spt-unstructured", "spt-lora", "spt-lora-structured")
    for number, name in enumerate(names):
        run(tmp_path / name, 0.1 * (number + 1), name)
    made = structure_ablation(read_runs([tmp_path]).runs)
    assert {row.method: row.mean for row in made.each} == pytest.approx(
        {"spt-lora-structured": 0.4, "spt-lora": 0.3, "spt-unstructured": 0.2}
    )


def test_samples_are_those_that_there_were(tmp_path: Path) -> None:
    few = {"images": {"train": 300}}
    run(tmp_path / "a", 0.5, samples=240, result=few)
    run(tmp_path / "b", 0.6, samples=800, result=few)
    run(tmp_path / "c", 0.1, "linear", samples=800, result={"images": {"train": 9}})  # of none
    at = [row.settings["samples"] for row in samples_ablation(read_runs([tmp_path]).runs).each]
    assert at == [240, 300]
    run(tmp_path / "d", 0.7, samples=1600, result=few)
    with pytest.raises(ValueError, match=r"two runs of spt-lora on photos .*leave one out"):
        samples_ablation(read_runs([tmp_path]).runs)
    for name, samples in (("w", 240), ("x", 800)):  # another task has them all
        run(
            tmp_path / "more" / name,
            0.6,
            samples=samples,
            images="w",
            result={"images": {"train": 900}},
        )
    both = [tmp_path / name for name in ("a", "b", "more")]
    at = [row.settings["samples"] for row in samples_ablation(read_runs(both).runs).each]
    assert at == [240, 800]


def test_samples_of_a_given_sensitivity_are_its_own(tmp_path: Path) -> None:
    for name, samples in (("a", 240), ("b", 800)):
        folder = run(tmp_path / name, 0.5, samples=samples, result={"images": {"train": 30}})
        config = json.loads((folder / "config.json").read_text())
        config["job"]["sensitivity"] = "scores.safetensors"
        (folder / "config.json").write_text(json.dumps(config))
    made = samples_ablation(read_runs([tmp_path]).runs)
    assert [row.settings["samples"] for row in made.each] == [240, 800]


def test_samples_come_in_their_order(tmp_path: Path) -> None:
    for samples, accuracy in ((800, 0.8), (240, 0.5), (400, 0.6)):
        run(tmp_path / str(samples), accuracy, samples=samples)
    run(tmp_path / "linear", 0.1, "linear")
    made = samples_ablation(read_runs([tmp_path]).runs)
    assert [(row.settings["samples"], row.mean) for row in made.each] == [
        *((240, 0.5), (400, 0.6), (800, 0.8))
    ]


def test_validation_stands_in_where_no_run_was_tested(tmp_path: Path) -> None:
    run(tmp_path / "a", 0.5, result={"test_accuracy": None, "val_accuracy": 0.3})
    made = accuracy_by_budget(read_runs([tmp_path]).runs)
    assert (made.images, made.each[0].mean) == ("validation", 0.3)
