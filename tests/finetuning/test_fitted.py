"""A run in a given memory: what is left to it, and what cannot be."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from spt_kernels import methods
from spt_kernels.finetuning import (
    FinetuneJob,
    ImageSource,
    Method,
    ModelSource,
    Recipe,
    finetune,
    pipeline,
)
from spt_kernels.finetuning.base.models import build
from spt_kernels.finetuning.run.facts import accounted_bytes, accounted_how
from spt_kernels.finetuning.run.setting import open_setting
from spt_kernels.memory import estimate_memory

from .killed import Heard, Killed
from .pictures_on_disk import TINY
from .undrawn import leave_pictures_empty

RECIPE = Recipe(epochs=1, batch_size=8)


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_pictures_empty(monkeypatch, pipeline)


def test_a_run_stays_within_its_memory(place: Path, task: ImageSource, base: ModelSource) -> None:
    job = FinetuneJob(base, task, Method("spt-unstructured", 600, samples=20), RECIPE)
    whole = finetune(job, place / "whole")
    assert (whole["micro_batch"], whole["recompute"]) == (None, None)
    limit = int(0.8 * whole["accounted_peak_bytes"])
    tight = replace(job, recipe=replace(RECIPE, memory_bytes=limit))
    result = finetune(tight, place / "tight")
    assert result["accounted_peak_bytes"] <= limit
    assert result["micro_batch"] is not None or result["recompute"] is not None
    assert result["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-3)
    log = (place / "tight" / "log.txt").read_text()
    assert "at a time" in log
    config = json.loads((place / "tight" / "config.json").read_text())
    assert config["job"]["recipe"]["memory_bytes"] == limit
    # what was chosen is what could have been said
    said = replace(RECIPE, micro_batch=result["micro_batch"], recompute=result["recompute"])
    plain = finetune(replace(job, recipe=said), place / "said")
    assert plain["accounted_peak_bytes"] == result["accounted_peak_bytes"]
    assert plain["train_loss"] == pytest.approx(result["train_loss"], rel=1e-5)


def test_what_a_run_in_parts_takes_is_accounted_with_its_gradients(
    task: ImageSource, base: ModelSource
) -> None:
    recipe = replace(RECIPE, micro_batch=2)
    setting = open_setting(FinetuneJob(base, task, Method("full"), recipe))
    tunable = methods["full"](setting.base.model)
    estimate = estimate_memory(tunable.model, (8, 3, 16, 16), micro_batch=2, device="cpu")
    assert accounted_bytes(setting, recipe, tunable) == estimate.peak_bytes
    without = estimate_memory(tunable.model, (2, 3, 16, 16), device="cpu")
    assert estimate.peak_bytes > without.peak_bytes


def test_a_batch_is_accounted_with_the_images_that_there_are(
    place: Path, task: ImageSource, base: ModelSource
) -> None:
    recipe = replace(RECIPE, batch_size=64)
    job = FinetuneJob(base, task, Method("full"), recipe)
    setting = open_setting(job)
    count = len(setting.splits.train)
    assert count < 64
    tunable = methods["full"](setting.base.model)
    peaks = [
        estimate_memory(tunable.model, (images, 3, 16, 16), device="cpu").peak_bytes
        for images in (count, 64)
    ]
    assert accounted_bytes(setting, recipe, tunable) == peaks[0]
    tight = replace(recipe, memory_bytes=sum(peaks) // 2)
    result = finetune(replace(job, recipe=tight), place / "few")
    assert (result["micro_batch"], result["recompute"]) == (None, None)
    assert result["accounted_peak_bytes"] == peaks[0]


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (
            Method("linear"),
            {"memory_bytes": 1000},
            "no step fits in 0.00 MiB; the least is .*, 1 image at a time",
        ),
        (
            Method("spt-lora", 600),
            {"memory_bytes": 1000},
            "sensitivity cannot be measured in 0.00 MiB",
        ),
        (Method("noah"), {"memory_bytes": 2**30}, "while it searches is not accounted for"),
    ],
)
def test_what_fits_in_nothing(
    place: Path, task: ImageSource, base: ModelSource, method: Method, change: dict, message: str
) -> None:
    job = FinetuneJob(base, task, method, replace(RECIPE, **change))
    with pytest.raises(ValueError, match=message):
        finetune(job, place / "nothing")


@pytest.mark.parametrize(
    ("method", "words"),
    [(Method("spt-unstructured", 600, samples=20), "frozen"), (Method("partial-1"), "state")],
)
def test_what_is_on_the_host_changes_no_bit(
    method: Method,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: ImageSource,
    base: ModelSource,
) -> None:
    monkeypatch.setattr(pipeline, "accounted_bytes", lambda *_: 0)
    job = FinetuneJob(base, task, method, replace(RECIPE, epochs=2))
    plain = finetune(job, tmp_path / "plain")
    away = replace(job, recipe=replace(job.recipe, offload=words))
    with pytest.raises(Killed):
        finetune(away, tmp_path / "away", checkpoint_seconds=0, progress=Heard("epoch 2/2"))
    shutil.copytree(tmp_path / "away", tmp_path / "back")
    results = [
        finetune(away, tmp_path / "away", resume=True),
        finetune(job, tmp_path / "back", resume=True),
    ]
    assert [result["offload"] for result in results] == [words, None]
    for name in ("away", "back"):
        for file in (plain["file"], "predictions.jsonl"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    told = (tmp_path / "away" / "log.txt").read_text()
    assert ("frozen weights of 2 blocks on the host" in told) == (words == "frozen")


def test_a_run_with_weights_on_the_host_stays_within_its_memory(
    tmp_path: Path, task: ImageSource
) -> None:
    deep = {**TINY, "depth": 4}  # two blocks at a time are there
    weights = tmp_path / "deep.safetensors"
    base = ModelSource("vit_tiny_patch16_224", deep, str(weights))
    save_file(build(replace(base, weights=None), 5, seed=3).model.state_dict(), weights)
    job = FinetuneJob(base, task, Method("lora-2"), RECIPE)
    setting = open_setting(job)
    model = methods["lora-2"](setting.base.model).model
    plain, away = (
        accounted_how(replace(RECIPE, offload=words), setting.device) for words in (None, "frozen")
    )
    peaks = [estimate_memory(model, (8, 3, 16, 16), **how).peak_bytes for how in (plain, away)]
    assert peaks[1] < 0.95 * peaks[0]
    fits = replace(RECIPE, offload="frozen", memory_bytes=sum(peaks) // 2)
    result = finetune(replace(job, recipe=fits), tmp_path / "run")
    assert (result["micro_batch"], result["recompute"]) == (None, None), "it fits as it is"
    assert result["accounted_peak_bytes"] == peaks[1]


@pytest.mark.parametrize(
    ("method", "words", "graph", "message"),
    [
        (Method("spt-lora", 600), "state", None, "'spt-lora' has next to no state to keep on the"),
        (Method("noah"), "frozen", None, "'noah' trains while it searches is not offloaded"),
        (Method("lora"), "frozen", True, "graph: a CUDA graph finds what it reads where it was"),
        (Method("full"), "frozen", None, "offload: expected blocks with frozen matrices of their"),
        (Method("lora-2"), "forward-only", None, "offload: no block of .* comes before all that"),
    ],
)
def test_what_cannot_be_on_the_host(
    method: Method,
    words: str,
    graph: bool | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: ImageSource,
    base: ModelSource,
) -> None:
    job = FinetuneJob(base, task, method, replace(RECIPE, offload=words))
    monkeypatch.setattr(pipeline, "wants_graph", lambda *_: graph)
    with pytest.raises(ValueError, match=message):
        finetune(job, tmp_path / "run", graph=graph)
    assert not list(tmp_path.iterdir())


def test_what_a_rehearsal_alone_can_tell(
    tmp_path: Path, task: ImageSource, base: ModelSource
) -> None:
    # on a CPU attention with dropout has no fused kernel
    dropping = replace(base, args={**base.args, "attn_drop_rate": 0.1})
    job = FinetuneJob(dropping, task, Method("lora"), replace(RECIPE, recompute="qkv"))
    with pytest.raises(ValueError, match=r"recompute: blocks\.0\.attn: what=.* not by a fused"):
        finetune(job, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_memory_decides_alone() -> None:
    with pytest.raises(ValueError, match="memory_bytes: decides what micro_batch and recompute"):
        Recipe(memory_bytes=2**30, micro_batch=2)
