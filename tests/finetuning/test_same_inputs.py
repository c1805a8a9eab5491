"""A run goes on with the images and weights that it began with, from a state that can be read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spt_kernels.finetuning import FinetuneJob, ImageSource, Method, ModelSource, Recipe, finetune

from .pictures_on_disk import write_task

pytestmark = pytest.mark.usefixtures("quickly")

RECIPE = Recipe(epochs=1, batch_size=8)


@pytest.fixture
def begun(tmp_path: Path, base: ModelSource) -> tuple[FinetuneJob, Path, dict[str, Any]]:
    """A finished run, to be made longer, of images of its own."""
    data = write_task(tmp_path / "photos", train=5, test=1)
    weights = shutil.copy(str(base.weights), tmp_path / "base.safetensors")
    own = replace(base, weights=str(weights))
    job = FinetuneJob(own, ImageSource(str(data)), Method("linear"), RECIPE)
    result = finetune(job, tmp_path / "run")
    return replace(job, recipe=replace(RECIPE, epochs=2)), tmp_path / "run", result


def state_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "log.txt"}


def one_more(data: Path) -> None:
    shutil.copy(data / "train" / "red" / "000.png", data / "train" / "red" / "more.png")


def one_less(data: Path) -> None:
    (data / "train" / "red" / "000.png").unlink()


def another_name(data: Path) -> None:
    (data / "train" / "red" / "000.png").rename(data / "train" / "red" / "999.png")


def another_class(data: Path) -> None:
    shutil.copytree(data / "train" / "red", data / "train" / "zred")


def a_class_that_moves(data: Path) -> None:
    for split in ("train", "test"):
        (data / split / "red").rename(data / split / "a red one")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (one_more, "12 training and 3 validation images, now there are 13 training and 3"),
        (one_less, "12 training and 3 validation images, now there are 11 training and 3"),
        (another_name, "12 training and 3 validation images, now there are 12 .* the same names"),
        (another_class, "the classes blue, green, red, now there are blue, green, red, zred"),
        (a_class_that_moves, "the classes blue, green, red, now there are a red one, blue, green"),
    ],
)
def test_other_images_are_refused_and_the_run_stays(
    begun: Any, tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    job, folder, _ = begun
    before = state_of(folder)
    change(tmp_path / "photos")
    with pytest.raises(ValueError, match=f"data: the run began with {words}"):
        finetune(job, folder, resume=True)
    assert state_of(folder) == before


def test_images_that_are_only_looked_at_may_be_others(begun: Any, tmp_path: Path) -> None:
    job, folder, _ = begun
    (tmp_path / "photos" / "test" / "red" / "000.png").rename(
        tmp_path / "photos" / "test" / "red" / "111.png"
    )
    assert finetune(job, folder, resume=True)["epochs"] == 2


def test_other_weights_under_the_same_name_are_refused(
    begun: Any, tmp_path: Path, base: ModelSource
) -> None:
    job, folder, _ = begun
    before = state_of(folder)
    tensors = load_file(tmp_path / "base.safetensors")
    tensors["blocks.0.mlp.fc1.bias"] += 1.0
    save_file(tensors, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match="weights: the run began with other values in this file"):
        finetune(job, folder, resume=True)
    assert state_of(folder) == before
    shutil.copy(str(base.weights), tmp_path / "base.safetensors")
    assert finetune(job, folder, resume=True)["epochs"] == 2


def test_a_run_of_an_older_version_tells_its_classes_alone(begun: Any, tmp_path: Path) -> None:
    job, folder, _ = begun
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("images")["training"] == 12
    assert config.pop("weights")["bytes"] == (tmp_path / "base.safetensors").stat().st_size
    (folder / "config.json").write_text(json.dumps(config))
    one_more(tmp_path / "photos")
    assert finetune(job, folder, resume=True)["epochs"] == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"the checkpoint is damaged \(EOFError\)"),
        (b"garbage" * 100, "the checkpoint is damaged"),
        ([1, 2], "the checkpoint is damaged"),
        ({"format": 3}, "the checkpoint is damaged"),
        ({"format": 99}, "checkpoint of version 99, expected 3"),
        ("other shape", r"of another model: head\.\w+: expected shape .*, got \[1\]"),
    ],
    ids=str,
)
def test_a_state_that_cannot_be_gone_on_from_leaves_the_run_as_it_is(
    begun: Any, content: Any, words: str
) -> None:
    job, folder, result = begun
    state = folder / "state.pt"
    if content == "other shape":
        content = torch.load(state)
        content["tensors"] = {name: torch.zeros(1) for name in content["tensors"]}
    if isinstance(content, bytes):
        state.write_bytes(content)
    else:
        torch.save(content, state)
    before = state_of(folder)
    with pytest.raises(ValueError, match=rf"run/state\.pt: .*{words}"):
        finetune(job, folder, resume=True)
    assert state_of(folder) == before
    assert json.loads((folder / "result.json").read_text()) == result
