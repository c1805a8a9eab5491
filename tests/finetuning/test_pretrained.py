"""timm's own weights without a network: from the cache, or one line that says what to do."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from spt_kernels.finetuning.models import ModelSource, build

from .pictures_on_disk import TINY, write_weights

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


def test_weights_of_the_hub_come_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_weights(tmp_path / "w.safetensors", num_classes=1000)
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda _, file: str(tmp_path / "w.safetensors") if file == "model.safetensors" else None,
    )
    base = build(HUB, 3)
    assert base.head_is_new
    saved = load_file(tmp_path / "w.safetensors")
    assert torch.equal(base.model.blocks[1].mlp.fc1.weight, saved["blocks.1.mlp.fc1.weight"])


def test_an_architecture_without_published_weights_is_told() -> None:
    overlay = {"hf_hub_id": None, "url": None}
    source = ModelSource(HUB.name, {**TINY, "pretrained_cfg_overlay": overlay}, pretrained=True)
    with pytest.raises(ValueError, match=r"the weights of vit_tiny_patch16_224 cannot be had: No "):
        build(source, 3)
