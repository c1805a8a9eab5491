"""A run in a given memory: what is left to it, and what cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from spt_kernels.finetuning import (
    FinetuneJob,
    ImageSource,
    Method,
    ModelSource,
    Recipe,
    finetune,
    pipeline,
)

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


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (
            Method("linear"),
            {"memory_bytes": 1000},
            "no step fits in 0.00 GiB; the least is .*, 1 image at a time",
        ),
        (
            Method("spt-lora", 600),
            {"memory_bytes": 1000},
            "sensitivity cannot be measured in 0.00 GiB",
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
