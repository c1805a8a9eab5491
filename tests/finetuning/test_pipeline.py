"""Whole runs on small images: every method, kill and resume to the byte, what is left on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spt_kernels.finetuning import (
    FinetuneJob,
    ImageSource,
    Method,
    ModelSource,
    Recipe,
    SavedRun,
    build,
    evaluate,
    finetune,
    pipeline,
)
from spt_kernels.finetuning.images.pixels import Batches, PixelSet
from spt_kernels.finetuning.images.splits import read_evaluation_images
from spt_kernels.sensitivity import Sensitivity
from spt_kernels.task import read_metadata
from tests.methods import every

from .undrawn import draw_nothing, leave_pictures_empty

SHORT = Recipe(epochs=3, batch_size=8)


def method(name: str) -> Method:
    budgets = {"peft": 1000, "spt-lora-structured": 1500, "spt-adapter-structured": 1500}
    return every.method(name, next((n for k, n in budgets.items() if name.startswith(k)), 400))


LIKE_ANOTHER = ("prompt-shallow", "adaptformer", "sensitive-adapter-2")  # to a run


@pytest.mark.parametrize("name", [name for name in every.NAMES if name not in LIKE_ANOTHER])
def test_a_run_leaves_a_model_that_loads_and_predicts_the_same(
    name: str,
    place: Path,
    task: ImageSource,
    base: ModelSource,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name not in ("spt-lora", "linear"):  # with a plan, and without
        draw_nothing(monkeypatch)
    folder = place / name
    job = FinetuneJob(base, task, method(name), SHORT)
    result = finetune(job, folder)
    saved = SavedRun.find(folder)
    images = read_evaluation_images(task.root, saved.classes)
    assert saved.form is not None
    batches = Batches(PixelSet(images, saved.form), 8, torch.device("cpu"))
    seen = evaluate(saved.load(), batches)
    assert seen.top1 == result["test_accuracy"]
    assert result["head"] == ["head"]
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [images.classes[c] for c in seen.predictions] == [row["predicted"] for row in rows]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert all(line["val_accuracy"] is not None for line in lines)
    made = {path.name for path in folder.iterdir()}
    assert {"config.json", "result.json", "curves.png"} <= made
    assert result["file"] in made
    assert (folder / result["file"]).stat().st_size == result["task_bytes"]
    assert ("sensitivity.png" in made) == job.method.is_sensitivity_aware
    assert "checkpoint.pt" not in made
    assert "state.pt" in made  # so that it can be made longer
    assert f"epoch 3/3 · loss {lines[2]['train_loss']:.4f}" in (folder / "log.txt").read_text()
    assert result["trained_parameters"] <= (result["budget"] or result["backbone_parameters"])


def test_an_approximate_run_says_so_wherever_it_is_told_of(
    place: Path, task: ImageSource, base: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_pictures_empty(monkeypatch, pipeline)
    folder, recipe = place / "approximate", replace(SHORT, epochs=1, approximate="gelu-2bit")
    finetune(FinetuneJob(base, task, method("spt-unstructured"), recipe), folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["job"]["recipe"]["approximate"] == "gelu-2bit"
    assert "activations in 2 bits" in (folder / "log.txt").read_text()
    told = read_metadata(folder / "task.safetensors")
    assert told["approximation"] == {"gelu": "2bit", "layer_norm": None}
    # what it learnt needs no approximation
    assert not hasattr(SavedRun.find(folder).load(), "spt_approximation")


@pytest.mark.usefixtures("quickly")
def test_the_colours_are_learnt(place: Path, task: ImageSource, base: ModelSource) -> None:
    recipe = Recipe(epochs=12, batch_size=8, lr=5e-3, drop_path=0.0)
    result = finetune(FinetuneJob(base, task, method("spt-lora"), recipe), place / "learnt")
    assert result["test_accuracy"] > 0.9  # chance is a third


@pytest.mark.usefixtures("quickly")
def test_the_same_job_gives_the_same_bytes_and_another_seed_others(
    place: Path, task: ImageSource, base: ModelSource
) -> None:
    job = FinetuneJob(base, task, method("spt-unstructured"), replace(SHORT, epochs=1))
    files = []
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        again = replace(job, recipe=replace(job.recipe, seed=seed))
        finetune(again, place / f"seed-{name}")
        files.append((place / f"seed-{name}" / "task.safetensors").read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_less_memory_gives_the_same_file_or_nearly(
    place: Path, task: ImageSource, base: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_pictures_empty(monkeypatch, pipeline)
    recipe = replace(SHORT, epochs=1, drop_path=0.2)
    job = FinetuneJob(base, task, replace(method("spt-lora"), dropout=0.1), recipe)
    whole = finetune(job, place / "all-kept")
    less = replace(recipe, recompute="mlp,qkv@0")
    again = finetune(replace(job, recipe=less), place / "recomputed")
    names = ("all-kept", "recomputed")
    files = [(place / name / "task.safetensors").read_bytes() for name in names]
    assert files[0] == files[1]
    assert again["accounted_peak_bytes"] < whole["accounted_peak_bytes"]

    plain = replace(job, recipe=replace(recipe, drop_path=0.0), method=method("spt-unstructured"))
    parted = replace(plain, recipe=replace(plain.recipe, micro_batch=3))
    results = [finetune(one, place / f"parted-{n}") for n, one in enumerate((plain, parted))]
    assert results[1]["train_loss"] == pytest.approx(results[0]["train_loss"], rel=1e-4)
    assert results[1]["accounted_peak_bytes"] < results[0]["accounted_peak_bytes"]
    # measured on parts of the same batches, too
    scores = [Sensitivity.load(place / f"parted-{n}" / "sensitivity.safetensors") for n in (0, 1)]
    for name, score in scores[0].items():
        torch.testing.assert_close(scores[1][name], score)


def test_blocks_that_are_not_there_are_refused_before_anything_is_written(
    place: Path, task: ImageSource, base: ModelSource
) -> None:
    recipe = replace(SHORT, recompute="mlp@0-7")
    with pytest.raises(ValueError, match="recompute: the model has 2 blocks, from 0 on"):
        finetune(FinetuneJob(base, task, method("linear"), recipe), place / "no-such-block")
    assert not (place / "no-such-block").exists()


@pytest.mark.usefixtures("quickly")
def test_a_finished_run_is_not_run_again(place: Path, task: ImageSource, base: ModelSource) -> None:
    job = FinetuneJob(base, task, method("linear"), replace(SHORT, epochs=1))
    first = finetune(job, place / "finished")
    stamp = (place / "finished" / "task.safetensors").stat().st_mtime_ns
    assert finetune(job, place / "finished", resume=True) == first
    assert (place / "finished" / "task.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="is not empty"):
        finetune(job, place / "finished")
    with pytest.raises(ValueError, match=r"holds another job \(lr was None, is 0.1\)"):
        finetune(replace(job, recipe=replace(SHORT, lr=0.1)), place / "finished", resume=True)
    finetune(replace(job, recipe=SHORT_TWO), place / "finished", force=True)
    assert json.loads((place / "finished" / "result.json").read_text())["epochs"] == 2


SHORT_TWO = replace(SHORT, epochs=2)


@pytest.mark.usefixtures("quickly")
def test_an_impossible_job_does_not_cost_the_old_result(
    place: Path, task: ImageSource, base: ModelSource
) -> None:
    job = FinetuneJob(base, task, method("spt-lora"), replace(SHORT, epochs=1))
    finetune(job, place / "kept")
    before = {path.name: path.read_bytes() for path in (place / "kept").iterdir()}
    given = str(place / "kept" / "sensitivity.safetensors")
    for change, message in (
        ({"images": ImageSource("nowhere")}, "no such folder"),
        ({"method": Method("spt-lora", 10**9)}, "budget"),
        ({"method": Method("spt-lora", 10**9), "sensitivity": given}, "budget"),
        ({"method": Method("lora", 1)}, "budget"),
        ({"method": Method("spt-lora"), "plan": given}, "cannot load the plan"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(replace(job, **change), place / "kept", force=True)
        after = {path.name: path.read_bytes() for path in (place / "kept").iterdir()}
        assert after == before


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("name", ["lora", "spt-lora", "spt-lora-structured"])
def test_a_refused_job_leaves_nothing_in_the_way_of_the_corrected_one(
    name: str, tmp_path: Path, task: ImageSource, base: ModelSource
) -> None:
    job = FinetuneJob(base, task, method(name), replace(SHORT, epochs=1))
    refused = Method(name, {"lora": 1, "spt-lora": 10**9}.get(name, 20))
    with pytest.raises(ValueError, match="budget"):
        finetune(replace(job, method=refused), tmp_path)
    assert not list(tmp_path.iterdir())
    finetune(job, tmp_path)


@pytest.mark.usefixtures("quickly")
def test_a_measured_sensitivity_or_a_plan_can_be_used_again(
    place: Path, task: ImageSource, base: ModelSource
) -> None:
    job = FinetuneJob(base, task, method("spt-lora"), replace(SHORT, epochs=1))
    finetune(job, place / "measured")
    sensitivity = replace(job, sensitivity=str(place / "measured" / "sensitivity.safetensors"))
    plan = replace(
        job, plan=str(place / "measured" / "plan.safetensors"), method=Method("spt-lora")
    )
    for name, again in (("from-sensitivity", sensitivity), ("from-plan", plan)):
        finetune(again, place / name)
        for file in ("plan.safetensors", "task.safetensors"):
            assert (place / name / file).read_bytes() == (place / "measured" / file).read_bytes()

    for name in ("dense-gradient", "spt-adapter", "spt-lora-structured"):
        with pytest.raises(ValueError, match=f"plan: expected one of method '{name}', got lora"):
            finetune(replace(plan, method=Method(name)), place / "of-another")
    for change, words in (
        ({"budget": 401}, "budget: the plan decides, and has 400, got 401"),
        ({"rank": 4}, "rank: the plan decides, and has 2, got 4"),
        ({"samples": 9}, "samples: the plan decides, and has 33, got 9"),
    ):
        with pytest.raises(ValueError, match=words):
            finetune(replace(plan, method=Method("spt-lora", **change)), place / "of-another")
    with pytest.raises(ValueError, match="samples: the sensitivity was measured on 33, got 9"):
        finetune(replace(sensitivity, method=Method(samples=9)), place / "of-another")
    assert not (place / "of-another").exists()
    with pytest.raises(ValueError, match="sensitivity: the plan was made of one already"):
        replace(plan, sensitivity=sensitivity.sensitivity)


@pytest.mark.usefixtures("quickly")
def test_the_plan_of_a_file_is_what_is_recorded(
    place: Path, task: ImageSource, base: ModelSource
) -> None:
    made = FinetuneJob(base, task, Method("spt-adapter", 400, 2, 30), replace(SHORT, epochs=1))
    finetune(made, place / "adapter")
    file = place / "adapter.plan"
    file.write_bytes((place / "adapter" / "plan.safetensors").read_bytes())
    again = FinetuneJob(base, task, recipe=made.recipe, plan=str(file))
    result = finetune(again, place / "adapter-again")
    assert result["method"] == "spt-adapter"
    config = json.loads((place / "adapter-again" / "config.json").read_text())
    assert Method(**config["job"]["method"]) == made.method
    file.unlink()  # the run has its own
    assert SavedRun.find(place / "adapter-again").load() is not None
    job = FinetuneJob.from_json(config["job"])
    assert finetune(job, place / "adapter-again", resume=True) == result


def test_a_method_that_tunes_needs_weights(task: ImageSource) -> None:
    with pytest.raises(ValueError, match="needs a pre-trained model"):
        FinetuneJob(ModelSource("vit_tiny_patch16_224"), task, Method("lora"))


def test_a_folder_that_cannot_be_written_is_refused(
    place: Path, task: ImageSource, base: ModelSource
) -> None:
    (place / "a-file").write_text("")
    job = FinetuneJob(base, task, method("linear"), SHORT)
    with pytest.raises(ValueError, match="output: cannot write"):
        finetune(job, place / "a-file")
    with pytest.raises(ValueError, match="output: cannot write"):
        finetune(job, place / "a-file" / "below")


@pytest.mark.usefixtures("quickly")
def test_the_base_model_of_a_run_is_found_again(
    place: Path, task: ImageSource, base: ModelSource
) -> None:
    finetune(FinetuneJob(base, task, method("lora"), replace(SHORT, epochs=1)), place / "found")
    alone = place / "alone.safetensors"
    alone.parent.mkdir(exist_ok=True)
    alone.write_bytes((place / "found" / "task.safetensors").read_bytes())
    expected = SavedRun.find(place / "found").load().state_dict()
    for saved in (SavedRun.find(alone), SavedRun.find(alone, base)):
        assert saved.num_classes == 3
        for name, tensor in saved.load().state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    with pytest.raises(ValueError, match=r"no task\.safetensors in this folder"):
        SavedRun.find(task.root)


@pytest.mark.usefixtures("quickly")
def test_full_fine_tuning_writes_a_plain_state_dict(
    place: Path, task: ImageSource, base: ModelSource
) -> None:
    job = FinetuneJob(base, task, method("full"), replace(SHORT, epochs=1))
    finetune(job, place / "whole-model")
    state = load_file(place / "whole-model" / "model.safetensors")
    assert state.keys() == build(base, 3).model.state_dict().keys()
