"""A merged model's file: the format that its name tells, read back by everyone, by us with more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from spt_kernels.finetuning.base.models import ModelSource, build
from spt_kernels.finetuning.images.pixels import Preprocessing
from spt_kernels.finetuning.run.description import Description
from spt_kernels.finetuning.run.merged_file import check_merged_name, write_merged
from spt_kernels.finetuning.run.saved_run import SavedRun

from .pictures_on_disk import TINY

NAME = "vit_tiny_patch16_224"
ABOUT = Description(
    ModelSource(NAME, TINY),
    ("a, b", "ç"),
    Preprocessing(16, (0.5,) * 3, (0.5,) * 3),
)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".PT"])
def test_a_merged_file_is_a_base_and_a_run(tmp_path: Path, suffix: str) -> None:
    model = build(ModelSource(NAME, TINY), 2, seed=7).model
    path = tmp_path / f"merged{suffix}"
    assert write_merged(path, model.state_dict(), ABOUT.to_json()) == path.stat().st_size
    base = build(ModelSource(NAME, TINY, weights=str(path)), 2)
    assert not base.head_is_new
    found = SavedRun.find(path, None if suffix == ".safetensors" else ModelSource(NAME, TINY))
    assert found.num_classes == 2
    for same in (base.model, found.load()):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, same.state_dict()[name]), name
    with pytest.raises(ValueError, match="is a whole model already"):
        found.merged()
    if suffix != ".safetensors":
        state = torch.load(path, weights_only=True)  # a plain state dict, for load_state_dict
        assert state.keys() == model.state_dict().keys()
        assert Description.of(path) == Description()
    else:
        assert Description.of(path) == ABOUT
        assert found.classes == ABOUT.classes
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["format"] == "pt"


def test_tied_weights_and_views_are_written_whole_and_alone(tmp_path: Path) -> None:
    large = torch.randn(1000, 4)
    state = {"a": large[:2], "b": large[:2].T, "c": large[:2]}
    for name in ("x.safetensors", "x.pt"):
        assert write_merged(tmp_path / name, state) < 8000
    assert torch.equal(torch.load(tmp_path / "x.pt")["b"], large[:2].T)


@pytest.mark.parametrize("name", ["m.ckpt", "m", "m.npz", "m.safetensors.bak"])
def test_another_ending_is_refused_before_anything_is_done(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"ends in \.safetensors, \.pt, \.pth or \.bin, got"):
        check_merged_name(tmp_path / name)
    with pytest.raises(ValueError, match="ends in"):
        write_merged(tmp_path / name, {})
    assert not (tmp_path / name).exists()


def test_a_state_dict_without_a_head_has_no_classes(tmp_path: Path) -> None:
    body = build(ModelSource(NAME, TINY), 0).model.state_dict()
    write_merged(tmp_path / "m.pt", body)
    with pytest.raises(ValueError, match="has no head of vit_tiny"):
        SavedRun.find(tmp_path / "m.pt", ModelSource(NAME, TINY))
    with pytest.raises(ValueError, match="does not tell its base model; name it"):
        SavedRun.find(tmp_path / "m.pt")
