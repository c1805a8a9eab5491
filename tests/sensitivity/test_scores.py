"""The Sensitivity value: made of tensors, looked at, saved and loaded."""

from __future__ import annotations

import contextlib
import copy
import pickle
from pathlib import Path

import pytest
import torch

import spt_kernels as spt
from spt_kernels.model import describe
from tests.models import tiny_batch, tiny_vit


@pytest.fixture(scope="module")
def measured() -> spt.Sensitivity:
    return spt.measure_sensitivity(tiny_vit(depth=1), [tiny_batch(2)], include=["cls_token"])


def assert_same(first: spt.Sensitivity, second: spt.Sensitivity) -> None:
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    for field in ("info", "num_samples", "model_name", "head", "backbone_numel", "fallback"):
        assert getattr(first, field) == getattr(second, field), field


def test_it_is_a_mapping(measured: spt.Sensitivity) -> None:
    assert len(measured) == len(list(measured)) == len(dict(measured))
    assert "blocks.0.mlp.fc1.weight" in measured
    assert measured["blocks.0.mlp.fc1.weight"].shape == (96, 24)
    with pytest.raises(KeyError):
        measured["head.weight"]


def test_repr_is_short(measured: spt.Sensitivity) -> None:
    assert repr(measured) == (
        "Sensitivity(VisionTransformer, 15 parameters of 7,296 numbers, 2 samples)"
    )


def test_save_and_load(measured: spt.Sensitivity, tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.safetensors"
    measured.save(path)
    assert_same(spt.Sensitivity.load(path), measured)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "a temporary file was left"


def test_the_same_content_gives_the_same_bytes(measured: spt.Sensitivity, tmp_path: Path) -> None:
    measured.save(tmp_path / "a")
    spt.Sensitivity.load(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_views_of_one_tensor_can_be_saved(tmp_path: Path) -> None:
    whole = torch.rand(6, 4)
    parts = spt.Sensitivity.from_tensors(
        {"a": whole[:3], "b": whole[3:], "c": whole, "d": whole}, 1
    )
    parts.save(tmp_path / "parts")
    assert_same(spt.Sensitivity.load(tmp_path / "parts"), parts)


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "sensitivity"
    spt.Sensitivity.from_tensors({"a.weight": torch.rand(2, 2)}, 3).save(path)
    whole = path.read_bytes()
    content = spt.Sensitivity.load(path)
    for place in range(0, 8 * len(whole), 7):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with contextlib.suppress(spt.DeltaFormatError):
            # padding of the header says nothing: then the content must be the same
            assert_same(spt.Sensitivity.load(path), content)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_cut_file_is_an_error(measured: spt.Sensitivity, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "sensitivity"
    measured.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(spt.DeltaFormatError, match="cannot load the sensitivity"):
        spt.Sensitivity.load(path)


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        spt.Sensitivity.load(tmp_path / "nothing")


def test_a_failed_save_keeps_the_old_file(measured: spt.Sensitivity, tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(OSError, match="folder"):
        measured.save(path)
    with pytest.raises(OSError, match="nowhere"):
        measured.save(tmp_path / "nowhere" / "sensitivity")


def test_from_tensors_guesses_or_is_told_what_parameters_are() -> None:
    scores = {
        "blocks.0.attn.qkv.weight": torch.rand(72, 24).double(),
        "norm.weight": torch.rand(24),
    }
    guessed = spt.Sensitivity.from_tensors(scores, num_samples=7)
    assert [rows.operation for rows in guessed.info["blocks.0.attn.qkv.weight"].row_blocks] == [
        "q",
        "k",
        "v",
    ]
    assert guessed.num_samples == 7
    assert guessed.backbone_numel == 73 * 24
    assert all(score.dtype == torch.float32 for score in guessed.values())
    model = tiny_vit(depth=1)
    told = spt.Sensitivity.from_tensors(
        scores, 7, info=describe(model), head=("head.weight",), model_name="x", backbone_numel=99
    )
    assert told.info == guessed.info
    assert (told.head, told.model_name, told.backbone_numel) == (("head.weight",), "x", 99)


def test_from_tensors_leaves_out_scores_of_the_head_that_it_is_told() -> None:
    scores = {n: torch.ones(4, 4) for n in ("body.weight", "score.weight")}
    told = spt.Sensitivity.from_tensors(scores, 1, head="score")
    assert list(told) == ["body.weight"]
    assert (told.head, told.head_source, told.backbone_numel) == (("score",), "given", 16)
    assert spt.Sensitivity.from_tensors(scores, 1).head_source == ""
    assert spt.Sensitivity.from_tensors(scores, 1, head="none").head_source == "given"
    with pytest.raises(ValueError, match=r"head: .* is all that there are scores of"):
        spt.Sensitivity.from_tensors(scores, 1, head="*")


@pytest.mark.parametrize(
    ("tensors", "num_samples", "message"),
    [
        ({}, 1, "tensors: expected at least one"),
        ({"a": torch.rand(2)}, 0, "num_samples"),
        ({"a": torch.ones(2, dtype=torch.int64)}, 1, "'a'.*int64"),
        ({"a": [1.0]}, 1, "'a'.*list"),
    ],
    ids=["empty", "no-samples", "integers", "list"],
)
def test_from_tensors_with_bad_input(tensors, num_samples, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        spt.Sensitivity.from_tensors(tensors, num_samples)


def test_from_tensors_with_the_wrong_description() -> None:
    info = describe(tiny_vit(depth=1))
    with pytest.raises(ValueError, match=r"'norm.weight'.*\(24,\).*\(23,\)"):
        spt.Sensitivity.from_tensors({"norm.weight": torch.rand(23)}, 1, info=info)
    with pytest.raises(ValueError, match="'other'"):
        spt.Sensitivity.from_tensors({"other": torch.rand(23)}, 1, info=info)


def test_it_is_frozen_and_can_be_copied(measured: spt.Sensitivity) -> None:
    with pytest.raises(AttributeError):
        measured.num_samples = 3  # type: ignore[misc]
    assert_same(copy.deepcopy(measured), measured)
    assert_same(pickle.loads(pickle.dumps(measured)), measured)
