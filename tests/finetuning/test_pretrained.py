"""timm's own weights without a network: from the cache, or one line that says what to do."""

from __future__ import annotations

import socket
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from spt_kernels.finetuning import FinetuneJob, ImageSource, Method, Recipe, finetune
from spt_kernels.finetuning.base.models import ModelSource, build

from .pictures_on_disk import TINY, write_task, write_weights

HUB = ModelSource("vit_tiny_patch16_224", TINY, pretrained=True)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)


def test_one_line_says_where_the_weights_are_to_be_had() -> None:
    message = r"huggingface\.co does not answer.*download https://.*/model\.safetensors"
    with pytest.raises(ValueError, match=message) as caught:
        build(HUB, 3)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("name that file as the weights (-w)")


def test_a_plain_address_that_does_not_answer_is_told() -> None:
    overlay = {"hf_hub_id": None, "url": "https://example.org/tiny.pth"}
    source = ModelSource(HUB.name, {**TINY, "pretrained_cfg_overlay": overlay}, pretrained=True)
    with pytest.raises(ValueError, match=r"example\.org does not answer"):
        build(source, 5)


@pytest.fixture
def in_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of weights that the hub's cache has."""
    path = tmp_path / "w.safetensors"
    write_weights(path, num_classes=1000)
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda _, file: str(path) if file == "model.safetensors" else None,
    )
    return path


def test_weights_of_the_hub_come_from_the_cache(in_cache: Path) -> None:
    base = build(HUB, 3)
    assert base.head_is_new
    saved = load_file(in_cache)
    assert torch.equal(base.model.blocks[1].mlp.fc1.weight, saved["blocks.1.mlp.fc1.weight"])


@pytest.mark.usefixtures("quickly")
def test_a_run_does_not_go_on_with_weights_that_the_hub_has_exchanged(
    tmp_path: Path, in_cache: Path
) -> None:
    data = ImageSource(str(write_task(tmp_path / "photos", train=5, test=1)))
    job = FinetuneJob(HUB, data, Method("linear"), Recipe(epochs=1, batch_size=8))
    finetune(job, tmp_path / "run")
    job = replace(job, recipe=replace(job.recipe, epochs=2))
    before = in_cache.read_bytes()
    tensors = load_file(in_cache)
    tensors["blocks.0.mlp.fc1.bias"][3] += 1.0
    save_file(tensors, in_cache)
    with pytest.raises(ValueError, match="pretrained: the run began with other weights than timm"):
        finetune(job, tmp_path / "run", resume=True)
    in_cache.write_bytes(before)
    assert finetune(job, tmp_path / "run", resume=True)["epochs"] == 2


def test_an_architecture_without_published_weights_is_told() -> None:
    overlay = {"hf_hub_id": None, "url": None}
    source = ModelSource(HUB.name, {**TINY, "pretrained_cfg_overlay": overlay}, pretrained=True)
    with pytest.raises(ValueError, match=r"the weights of vit_tiny_patch16_224 cannot be had: No "):
        build(source, 3)
