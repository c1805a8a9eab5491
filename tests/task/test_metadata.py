"""What a task file tells besides its tensors: kept as it is, checked where commands go by it."""

from __future__ import annotations

import enum
import json
from collections import OrderedDict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import spt_kernels as spt
from spt_kernels.files import container
from tests.models import tiny_vit
from tests.task.test_delta import assert_same_picture, make_plan, picture

CLASSES = ["daisy", "rose, wild", "tulip", "été", "x\n"]
FORM = {"size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 1], "interpolation": "bicubic"}
MODEL = {"name": "vit_tiny_patch16_224", "arguments": {"img_size": 16, "depth": 2}}
KNOWN = {"classes": CLASSES, "preprocessing": FORM, "model": MODEL}
ANYTHING = {"run": {"lr": 1e-3, "tags": ["a", None, True, -(2**63)], "": {}}, "note": "ü"}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    plain = tiny_vit()
    return spt.apply(plain, make_plan(plain, "unstructured"))


@pytest.mark.parametrize("metadata", [None, {}, KNOWN, ANYTHING, {**KNOWN, **ANYTHING}])
def test_metadata_comes_back_as_it_was(
    model: nn.Module, tmp_path: Path, metadata: dict[str, Any] | None
) -> None:
    path = tmp_path / "task.safetensors"
    assert spt.save_delta(model, path, metadata=metadata) == path.stat().st_size
    found = spt.read_metadata(path)
    assert found == (metadata or {})
    found["mine"] = 1  # a dict of its own
    assert "mine" not in spt.read_metadata(path)
    spt.load_delta(tiny_vit(), path)


def test_nothing_said_changes_no_byte(model: nn.Module, tmp_path: Path) -> None:
    for name, metadata in (("a", None), ("b", {}), ("c", ANYTHING), ("d", ANYTHING)):
        spt.save_delta(model, tmp_path / name, metadata=metadata)
    a, b, c, d = ((tmp_path / name).read_bytes() for name in "abcd")
    assert a == b
    assert c == d != a


def test_numbers_and_names_of_other_kinds_become_plain(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    kind = enum.Enum("Kind", {"A": "a"}, type=str)
    spt.save_delta(
        model, path, metadata={kind.A: [kind.A, np.float64(0.5), enum.IntEnum("N", "X").X]}
    )
    found = spt.read_metadata(path)
    assert found == {"a": ["a", 0.5, 1]}
    assert [type(value) for value in found["a"]] == [str, float, int]


def test_any_mapping_and_tuple_will_do(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    size = MappingProxyType({**FORM, "size": (16, 24), "fit": "crop"})
    metadata = OrderedDict(classes=tuple(CLASSES), preprocessing=size, model={"name": "vit"})
    spt.save_delta(model, path, metadata=metadata)
    form = {**FORM, "size": [16, 24], "fit": "crop"}
    found = {"classes": CLASSES, "preprocessing": form, "model": {"name": "vit"}}
    assert spt.read_metadata(path) == found


LOOP: dict[str, Any] = {}
LOOP["loop"] = LOOP
BAD: list[tuple[Any, type[Exception], str]] = [
    ([], TypeError, "metadata must be a mapping, got list"),
    ({1: 2}, TypeError, "metadata must have strings as keys, got 1"),
    ({"a": {"b": {3: 4}}}, TypeError, r"metadata\['a'\]\['b'\] must have strings as keys, got 3"),
    ({"a": [0, torch.ones(1)]}, TypeError, r"metadata\['a'\]\[1\] must be .* got Tensor"),
    ({"a": Path("x")}, TypeError, r"metadata\['a'\] must be .* got PosixPath"),
    ({"a": {1, 2}}, TypeError, "got set"),
    ({"a": b"x"}, TypeError, "got bytes"),
    ({"a": float("nan")}, ValueError, r"metadata\['a'\] must be finite, got nan"),
    ({"a": [float("inf")]}, ValueError, r"metadata\['a'\]\[0\] must be finite"),
    ({"a": 2**63}, ValueError, "64 bits"),
    (LOOP, ValueError, "nested in itself"),
    ({"classes": CLASSES[:4]}, ValueError, "must name the 5 outputs of the head .* got 4 names"),
    ({"classes": {"rose": 0}}, ValueError, r"metadata\['classes'\] must be a list of names"),
    ({"classes": []}, ValueError, "must be a list of names"),
    ({"classes": [*CLASSES[:4], 7]}, ValueError, "must be a list of names"),
    ({"classes": [*CLASSES[:4], ""]}, ValueError, "got an empty name"),
    ({"classes": [*CLASSES[:4], "daisy"]}, ValueError, "got 'daisy' more than once"),
    ({"preprocessing": {"size": 16}}, ValueError, "must be an object with size, mean, std"),
    ({"preprocessing": {**FORM, "size": 0}}, ValueError, r"\['size'\] must be pixels"),
    ({"preprocessing": {**FORM, "size": [16]}}, ValueError, r"\['size'\] must be pixels"),
    ({"preprocessing": {**FORM, "size": True}}, ValueError, r"\['size'\] must be pixels"),
    ({"preprocessing": {**FORM, "mean": "0.5"}}, ValueError, r"\['mean'\] must be a list of num"),
    ({"preprocessing": {**FORM, "std": [1.0]}}, ValueError, r"\['std'\] .* 3 channels"),
    ({"preprocessing": {**FORM, "std": [1, 1, 0]}}, ValueError, r"\['std'\] must be above zero"),
    ({"preprocessing": {**FORM, "interpolation": 3}}, ValueError, r"\['interpolation'\] must be a"),
    ({"model": "vit"}, ValueError, "must be an object with name, got 'vit'"),
    ({"model": {"name": ""}}, ValueError, r"\['name'\] must be a name"),
    (
        {"model": {"name": "vit", "arguments": [1]}},
        ValueError,
        r"\['arguments'\] must be an object",
    ),
]


@pytest.mark.parametrize(("metadata", "kind", "message"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_kept_is_refused_by_its_place(
    model: nn.Module, tmp_path: Path, metadata: Any, kind: type[Exception], message: str
) -> None:
    path, before = tmp_path / "task.safetensors", picture(model)
    path.write_bytes(b"old")
    with pytest.raises(kind, match=message):
        spt.save_delta(model, path, metadata=metadata)
    assert path.read_bytes() == b"old"
    assert_same_picture(model, before)


@pytest.mark.parametrize(
    "bad",
    [[], 3, {"classes": ["a"]}, {"model": 3}, {"preprocessing": {**FORM, "std": [0, 1, 1]}}],
    ids=str,
)
def test_a_file_that_says_it_otherwise_is_refused(
    model: nn.Module, tmp_path: Path, bad: Any
) -> None:
    path, fresh = tmp_path / "task.safetensors", tiny_vit()
    before = picture(fresh)
    spt.save_delta(model, path)
    metadata, tensors = container.unpack(path.read_bytes())
    document = {**json.loads(metadata["task"]), "metadata": bad}
    path.write_bytes(container.pack({**metadata, "task": json.dumps(document)}, tensors))
    for read in (spt.read_metadata, lambda path: spt.load_delta(fresh, path)):
        with pytest.raises(spt.DeltaFormatError, match="metadata"):
            read(path)
    assert_same_picture(fresh, before)


def test_a_file_from_before_there_was_metadata(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    spt.save_delta(model, path)
    metadata, tensors = container.unpack(path.read_bytes())
    path.write_bytes(container.pack({**metadata, "format_version": "2"}, tensors))
    assert spt.read_metadata(path) == {}
    spt.load_delta(tiny_vit(), path)


def test_another_kind_of_file_has_none_to_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    make_plan(tiny_vit(), "unstructured").save(path)
    with pytest.raises(spt.DeltaFormatError, match="it is not a task"):
        spt.read_metadata(path)
    with pytest.raises(FileNotFoundError):
        spt.read_metadata(tmp_path / "none")
