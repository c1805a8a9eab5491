"""Files and folders are found, called by their tasks, and refused where they do not go together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spt_kernels.benchmarks.shared_sensitivity import stored_for
from spt_kernels.plots import load_selection, read_runs, task_files
from spt_kernels.plots.runs import name_of

from .made_up import A, B, plan, run, scores


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("cifar.sensitivity", "cifar"),
        ("cifar.plan.safetensors", "cifar"),
        ("sensitivity/cifar.sensitivity", "cifar"),
        ("runs/cifar/plan.safetensors", "cifar"),
        ("vtab/cifar/spt-lora/seed0", "cifar"),
        ("vtab/cifar/spt-lora/seed12/sensitivity.safetensors", "cifar"),
        ("vtab/cifar/sensitivity/0a1b2c", "cifar"),
        ("runs/seed-lora", "seed-lora"),
    ],
)
def test_names_of_tasks(path: str, name: str) -> None:
    assert name_of(path) == name


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Two tasks; of one, runs of two methods."""
    for task, own in (("x", A), ("y", B)):
        folder = run(tmp_path / "out" / task / "spt-lora" / "seed0", 0.5)
        plan(own).save(folder / "plan.safetensors")
        scores(own).save(folder / "sensitivity.safetensors")
    other = run(tmp_path / "out" / "x" / "spt-adapter" / "seed0", 0.5, "spt-adapter")
    plan(A).save(other / "plan.safetensors")
    return tmp_path / "out"


def test_a_folder_of_tasks_is_a_group(grid: Path) -> None:
    found = task_files([grid])
    assert {name: list(tasks) for name, tasks in found.groups.items()} == {"out": ["x", "y"]}
    [note] = found.notes
    assert note.startswith("x: ")
    assert "spt-adapter/seed0 is shown, of 2 that have one" in note
    chosen = task_files([grid], methods=["spt-lora"])
    assert chosen.notes == ()
    assert chosen.groups["out"]["x"].parent.parent.name == "spt-lora"
    measured = task_files([grid], "sensitivity", labels=["MAE"])
    assert list(measured.groups) == ["MAE"]
    assert measured.groups["MAE"]["y"].name == "sensitivity.safetensors"


def test_methods_that_choose_by_no_sensitivity_are_passed_over(grid: Path) -> None:
    """Their plans come first by name and tell nothing of what is sensitive."""
    for method in ("bias", "lora-8", "dense-gradient"):
        folder = run(grid / "y" / method / "seed0", 0.5, method)
        plan(A).save(folder / "plan.safetensors")
    found = task_files([grid], methods=[])
    assert found.groups["out"]["y"].parents[1].name == "spt-lora"
    assert "y: " in found.notes[1]
    assert "of 2 that have one" in found.notes[1]
    named = task_files([grid / "y"], methods=["bias"]).groups["y"]["y"]
    assert named.parents[1].name == "bias"


def test_what_a_benchmark_shares_and_chooses_by(grid: Path) -> None:
    """Sensitivities lie beside the methods, by a digest; candidates beside the seeds.

    Options are chosen on fewer images, with a sensitivity of those, as many samples and one seed.
    """
    second = run(grid / "x" / "spt-lora" / "seed1", 0.5, seed=1)
    stores = {}
    for task, seed in (("x", 0), ("x", 1), ("y", 0)):
        first = grid / task / "spt-lora" / f"seed{seed}"
        chosen = first.with_name("choice") / f"scale={seed}"
        run(chosen, 0.9, images="chosen")
        for folder in (chosen, first):
            job = json.loads((folder / "config.json").read_text())["job"]
            stores[folder] = store = stored_for(job, grid / task)["sensitivity"]
            store.parent.mkdir(parents=True, exist_ok=True)
            scores(A).save(store)
        (first / "sensitivity.safetensors").unlink(missing_ok=True)
    for other in range(20):  # in whatever order their names are
        beside = grid / "x" / "sensitivity" / f"{other:02x}{other}"
        beside.mkdir()
        scores(B).save(beside / "sensitivity.safetensors")
    assert {r.task for r in read_runs([grid]).runs} == {"x", "y"}
    assert task_files([second], "sensitivity").groups[""]["x"] == stores[second]
    found = task_files([grid], "sensitivity", methods=["spt-lora"])
    shared = found.groups["out"]
    assert list(shared) == ["x", "y"]
    for task, file in shared.items():
        assert file == stores[grid / task / "spt-lora" / "seed0"]


def test_single_files_and_runs_are_one_group(grid: Path, tmp_path: Path) -> None:
    plan(A).save(tmp_path / "mine.plan")
    found = task_files([grid / "y" / "spt-lora" / "seed0", tmp_path / "mine.plan"])
    assert list(found.groups[""]) == ["y", "mine"]
    named = task_files([tmp_path / "mine.plan"], labels=["CIFAR-100"])
    assert list(named.groups[""]) == ["CIFAR-100"]


def test_a_folder_of_loose_files_is_a_group(tmp_path: Path) -> None:
    for name in ("b", "a"):
        plan(A).save(tmp_path / f"{name}.plan")
    scores(A).save(tmp_path / "c.sensitivity")
    assert list(task_files([tmp_path]).groups[tmp_path.name]) == ["a", "b"]
    assert list(task_files([tmp_path], "sensitivity").groups[tmp_path.name]) == ["c"]
    (tmp_path / "c.sensitivity").unlink()  # a plan may do where it is all there is
    assert list(task_files([tmp_path], "sensitivity").groups[tmp_path.name]) == ["a", "b"]


def test_what_does_not_go_together_is_told(grid: Path, tmp_path: Path) -> None:
    alone = tmp_path / "x.plan"
    plan(A).save(alone)
    other = tmp_path / "x.sensitivity"
    scores(A).save(other)
    for paths, more, words in (
        ([alone, grid], {}, "files of single tasks, or folders of several, got both"),
        ([alone, other], {}, "label: two are called 'x'"),
        ([alone], {"labels": ["a", "b"]}, "label: expected one for each of the 1, got 2"),
        ([], {}, "at least one, got none"),
        ([tmp_path / "none"], {}, "no such folder"),
        ([grid], {"methods": ["lora"]}, "holds no plan.safetensors of method lora"),
        ([grid / "x" / "spt-adapter" / "seed0"], {"kind": "sensitivity"}, "holds no sens"),
        ([grid / "x" / "spt-lora" / "seed0" / "result.json"], {}, "neither a plan nor a sens"),
    ):
        with pytest.raises(ValueError, match=words):
            task_files(paths, **more)  # type: ignore[arg-type]


def test_a_selection_is_read_of_either(grid: Path) -> None:
    folder = grid / "y" / "spt-lora" / "seed0"
    read = load_selection(folder / "plan.safetensors")
    chosen = load_selection(folder / "sensitivity.safetensors", 10)
    assert read.selected == chosen.selected
    with pytest.raises(ValueError, match=r"a plan has spent its own.*plan.safetensors\)"):
        load_selection(folder / "plan.safetensors", 10)


def test_runs_of_other_images_are_other_tasks(tmp_path: Path) -> None:
    run(tmp_path / "a", 0.5)
    run(tmp_path / "b", 0.5, images="other/photos")
    run(tmp_path / "c", 0.5, images="birds")
    run(tmp_path / "d", None)
    found = read_runs([tmp_path, tmp_path / "a"])
    assert [r.task for r in found.runs] == ["photos", "photos #2", "birds"]
    assert found.unfinished == (str(tmp_path / "d"),)
    with pytest.raises(ValueError, match=r"found none; not finished: .*d"):
        read_runs([tmp_path / "d"])
    with pytest.raises(ValueError, match="expected a finished run of method full, found none"):
        read_runs([tmp_path], ["full"])
    (tmp_path / "a" / "result.json").write_text("{}")
    with pytest.raises(ValueError, match=r"result\.json: expected 'method' in it, got nothing"):
        read_runs([tmp_path])
