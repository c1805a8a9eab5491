"""NOAH's supernet and search within a run: killed anywhere, never by the test images, used once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spt_kernels.finetuning import (
    FinetuneJob,
    ImageSource,
    Method,
    ModelSource,
    Recipe,
    SavedRun,
    finetune,
)
from spt_kernels.finetuning.run.setting import Setting
from spt_kernels.methods import noah
from spt_kernels.methods.noah_architecture import NoahArchitecture
from spt_kernels.methods.noah_search import search

from .killed import Heard, Killed

pytestmark = pytest.mark.usefixtures("quickly")

METHOD = Method("noah", 900, supernet_epochs=3, generations=2, population=4)
MADE = ("trained.safetensors", "architecture.json", "search.jsonl", "metrics.jsonl")


@pytest.fixture(scope="module")
def job(task: ImageSource, base: ModelSource) -> FinetuneJob:
    return FinetuneJob(base, task, METHOD, Recipe(epochs=2, batch_size=8, val_every=2))


@pytest.fixture(scope="module")
def whole(job: FinetuneJob, place: Path) -> Path:
    """The folder of a run that nothing stopped."""
    finetune(job, place / "whole")
    return place / "whole"


def made_by(folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = {name: (folder / name).read_bytes() for name in MADE[:-1]}
    rows = [json.loads(line) for line in (folder / MADE[-1]).open()]
    return {**made, "metrics": [row | {"step_ms": 0} for row in rows]}


def test_wherever_it_is_killed_the_same_comes_out(
    job: FinetuneJob, whole: Path, place: Path
) -> None:
    folder = place / "killed"
    stages: list[list[str]] = []
    known = {"searching goes on": 1, "generation 1": 8, "generation 0": 8, "found": 12}
    for at in (
        "training the supernet goes on",  # nothing is kept yet
        "supernet: epoch 2/3",  # the checkpoint is of the first
        "searching begins",
        "searching goes on",
        "generation 1",
        "generation 0",  # what is known of the next one stays
        "found",
        "training goes on",
        "epoch 2/2",
        "testing goes on",
    ):
        heard = Heard(at)
        with pytest.raises(Killed):
            finetune(job, folder, resume=True, checkpoint_seconds=0, progress=heard)
        if at in known:
            assert len((folder / "search.jsonl").read_text().splitlines()) == known[at]
        stages.append([stage for stage in heard.stages if not stage.endswith(" images")])
    supernet = "training the supernet"
    assert stages[0] == stages[1] == [supernet]
    assert stages[2] == stages[6] == [supernet, "searching"]
    assert stages[7] == ["training"], "what was found is kept"
    result = finetune(job, folder, resume=True)
    assert made_by(folder) == made_by(whole)
    assert (
        result["test_accuracy"] == json.loads((whole / "result.json").read_text())["test_accuracy"]
    )
    found = json.loads((folder / "architecture.json").read_text())
    assert result["trained_parameters"] == found["parameters"] <= 900


def test_a_failure_in_the_search_does_not_cost_the_supernet(
    job: FinetuneJob, whole: Path, place: Path
) -> None:
    folder = place / "failed"

    class Failing(Heard):
        def _die(self, event: str) -> None:
            if event.startswith("searching begins"):
                raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        finetune(job, folder, progress=Failing())
    heard = Heard("generation 0")
    with pytest.raises(Killed):
        finetune(job, folder, resume=True, progress=heard)
    assert "supernet: going on after epoch 3 of 3" in heard.lines
    assert not any(line.startswith("supernet: epoch") for line in heard.lines)
    rows = (folder / "search.jsonl").read_text()
    assert (whole / "search.jsonl").read_text().startswith(rows)


def test_what_is_found_is_the_best_on_the_validation_images_alone(
    job: FinetuneJob, whole: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    read = Setting.batches
    monkeypatch.setattr(
        Setting,
        "batches",
        lambda self, split, log: (asked.append(split), read(self, split, log))[1],
    )
    heard = Heard("found")
    with pytest.raises(Killed):
        finetune(job, place / "found", progress=heard)
    assert asked == ["val"]
    rows = [json.loads(line) for line in (whole / "search.jsonl").open()]
    assert len(rows) == 12
    best = json.loads((whole / "architecture.json").read_text())
    assert best["val_accuracy"] == max(row["val_accuracy"] for row in rows)
    model = SavedRun.find(whole).load()
    assert len(model.blocks) == 2  # type: ignore[arg-type]

    # the search is that of `search`, given these accuracies
    scores = {NoahArchitecture.from_json(row): row["val_accuracy"] for row in rows}
    space = noah.NoahSpace(2, 24, 72)
    again = search(space, scores.__getitem__, 900, generations=2, population=4)
    assert again.best == NoahArchitecture.from_json(best)


def test_the_file_alone_is_enough_and_tells_its_architecture(whole: Path, place: Path) -> None:
    alone = place / "alone.safetensors"
    shutil.copy(whole / "trained.safetensors", alone)
    found = NoahArchitecture.load(whole / "architecture.json")
    assert noah.architecture_in(alone) == found
    saved = SavedRun.find(alone)
    assert saved.method is not None
    assert saved.method.architecture == found
    expected = SavedRun.find(whole).load().state_dict()
    for name, tensor in saved.load().state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_an_architecture_that_is_given_is_trained_as_the_one_that_was_found(
    job: FinetuneJob, whole: Path, place: Path
) -> None:
    found = NoahArchitecture.load(whole / "architecture.json")
    given = replace(job, method=replace(METHOD, architecture=found))
    heard = Heard()
    finetune(given, place / "given", progress=heard)
    assert not {"training the supernet", "searching"} & set(heard.stages)
    assert not (place / "given" / "supernet.pt").exists()
    trained = (place / "given" / "trained.safetensors").read_bytes()
    assert trained == (whole / "trained.safetensors").read_bytes()
    assert FinetuneJob.from_json(json.loads(json.dumps(given.to_json()))) == given


def test_a_run_is_made_longer_without_another_search(
    job: FinetuneJob, whole: Path, place: Path
) -> None:
    folder = place / "longer"
    shutil.copytree(whole, folder)
    longer = replace(job, recipe=replace(job.recipe, epochs=3))
    heard = Heard()
    assert finetune(longer, folder, resume=True, progress=heard)["epochs"] == 3
    assert "searching" not in heard.stages
    assert "training the supernet" not in heard.stages
    for name in ("architecture.json", "search.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    other = replace(job, method=replace(METHOD, generations=3))
    with pytest.raises(ValueError, match=r"holds another job \(generations was 2, is 3\)"):
        finetune(other, folder, resume=True)
    # overwriting starts from nothing
    heard = Heard("supernet: epoch 1/3")
    with pytest.raises(Killed):
        finetune(other, folder, force=True, progress=heard)
    assert {p.name for p in folder.iterdir()} == {"config.json", "log.txt"}


@pytest.mark.parametrize(
    ("images", "method", "words"),
    [
        ({"val_share": 0.0}, METHOD, "val_share: method 'noah' searches by validation images"),
        ({}, replace(METHOD, budget=192), r"budget: the smallest .* trains 193, got 192"),
        (
            {},
            replace(METHOD, architecture=NoahArchitecture.uniform(1, 3)),
            "architecture: the model has 2 blocks, got 3",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_done(
    images: dict[str, Any], method: Method, words: str, job: FinetuneJob, tmp_path: Path
) -> None:
    impossible = replace(job, images=replace(job.images, **images), method=method)
    heard = Heard()
    with pytest.raises(ValueError, match=words):
        finetune(impossible, tmp_path / "run", progress=heard)
    assert not (tmp_path / "run").exists()
    assert not {"training the supernet", "searching", "training"} & set(heard.stages)
