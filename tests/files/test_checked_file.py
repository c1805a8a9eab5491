"""Files of plans and sensitivities: whatever is wrong with one is one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import spt_kernels as spt
from spt_kernels.files import checked_file
from spt_kernels.files.container import pack
from tests.task.test_task_file import NASTY, paths_of

Load = Callable[[Path], Any]
LOADERS: dict[str, Load] = {"sensitivity": spt.Sensitivity.load, "plan": spt.Plan.load}
KINDS = pytest.mark.parametrize("kind", list(LOADERS))


def scores() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"blocks.0.qkv.weight": (6, 4), "blocks.0.qkv.bias": (6,)}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def example(kind: str) -> Any:
    sensitivity = spt.Sensitivity.from_tensors(scores(), 3, head=("head.weight",))
    if kind == "sensitivity":
        return sensitivity
    plan = spt.allocate(sensitivity, budget=20, structured="lora", rank=1)
    assert plan.structured
    assert plan.unstructured
    return plan


@pytest.fixture(params=list(LOADERS))
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Load]:
    path = tmp_path / "file"
    example(request.param).save(path)
    return path, LOADERS[request.param]


def test_every_cut_is_noticed(saved: tuple[Path, Load]) -> None:
    path, load = saved
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(spt.DeltaFormatError, match="cannot load the"):
            load(path)


def test_flipped_bits_are_noticed(saved: tuple[Path, Load]) -> None:
    path, load = saved
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 5):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(spt.DeltaFormatError, match="cannot load the"):
            load(path)


@KINDS
def test_a_path_that_is_no_file_is_told_of_by_its_name(kind: str, tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        LOADERS[kind](tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        LOADERS[kind](tmp_path / "absent")


@KINDS
@pytest.mark.parametrize("of", ["task", "other kind", "weights"])
def test_another_kind_of_file(kind: str, of: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if of == "weights":
        save_file({"x": torch.ones(2)}, path, {"format": "pt"})
    else:
        name = of if of == "task" else "plan" if kind == "sensitivity" else "sensitivity"
        path.write_bytes(checked_file.encode(name, {}, {"x": torch.ones(2)}))
    message = "another kind of file" if of == "weights" else f"it is not a {kind} but of format"
    with pytest.raises(spt.DeltaFormatError, match=f"cannot load the {kind} .*{message}"):
        LOADERS[kind](path)


DEEP = "[" * 100_000 + "]" * 100_000


@KINDS
@pytest.mark.parametrize("text", [DEEP, "[]", "3", "null", '"x"', "{"])
def test_a_description_that_is_none(kind: str, text: str, tmp_path: Path) -> None:
    metadata = {"format": f"spt_kernels.{kind}", kind: text}
    metadata["format_version"] = str(checked_file.VERSIONS[kind])
    path = tmp_path / "file"
    path.write_bytes(pack(metadata, {}))
    message = "nested too deeply" if text == DEEP else "cannot load the"
    with pytest.raises(spt.DeltaFormatError, match=message):
        LOADERS[kind](path)


@KINDS
def test_metadata_that_is_incomplete(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(pack({"format": f"spt_kernels.{kind}", "format_version": "3"}, {}))
    with pytest.raises(spt.DeltaFormatError, match="expected metadata"):
        LOADERS[kind](path)


@KINDS
def test_any_value_anywhere_in_the_description(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node of the JSON replaced by each nasty value: something sound, or one clear error."""
    monkeypatch.setattr("os.fsync", lambda _: None)  # hundreds of files, none to outlive the test
    path = tmp_path / "file"
    example(kind).save(path)
    whole, tensors = checked_file.read(path, kind, lambda *parts: parts)
    refused = 0
    for place in paths_of(whole):
        for value in NASTY:
            document = json.loads(json.dumps(whole))
            parent = document
            for key in place[:-1]:
                parent = parent[key]
            parent[place[-1]] = value
            checked_file.write(path, kind, document, tensors)
            try:
                found = LOADERS[kind](path)
            except spt.DeltaFormatError:
                refused += 1
                continue
            assert repr(found)
            assert kind == "sensitivity" or found.summary()
            found.save(path)  # what was read is what was there
            again, _ = checked_file.read(path, kind, lambda *parts: parts)
            assert again == document
    assert refused > 400


@pytest.mark.parametrize(
    ("kind", "place", "value", "message"),
    [
        ("plan", ["rank"], "8", 'rank: expected a whole number of 0 or more, got "8"'),
        ("plan", ["budget"], 20.0, r"budget: expected a whole number of 0 or more, got 20\.0"),
        ("plan", ["kind"], "loha", 'kind: expected one of lora, adapter, or null, got "loha"'),
        ("plan", ["head"], "head", 'head: expected a list of strings, got "head"'),
        ("plan", ["model_name"], None, "model_name: expected a string, got null"),
        (
            "plan",
            ["selected", "blocks.0.qkv.bias"],
            [1.5, 0, 0],
            "selected.blocks.0.qkv.bias: expe",
        ),
        (
            "plan",
            ["structured", "blocks.0.qkv.weight", "scale"],
            None,
            r"structured\.blocks\.0\.qkv\.weight\.scale: expected a number, got null",
        ),
        (
            "plan",
            ["info", "blocks.0.qkv.bias", "shape"],
            [6.0],
            "shape: expected a list of whole n",
        ),
        ("sensitivity", ["num_samples"], "3", "num_samples: expected a whole number of 0 or more"),
        ("sensitivity", ["idle"], [3], r"idle: expected a list of strings, got \[3\]"),
        ("sensitivity", ["info", 1, 1, "groups"], "1", "groups: expected a whole number above 0"),
    ],
)
def test_a_value_of_another_type_is_named(
    kind: str, place: list[Any], value: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    example(kind).save(path)
    document, tensors = checked_file.read(path, kind, lambda *parts: parts)
    parent = document
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    checked_file.write(path, kind, document, tensors)
    with pytest.raises(spt.DeltaFormatError, match=f"cannot load the {kind} .*{message}"):
        LOADERS[kind](path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_of_any_dtype_come_back_as_they_were(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = example("sensitivity")
    cast = {name: score.to(dtype) for name, score in whole.scores.items()}
    spt.Sensitivity(cast, whole.info, 3).save(tmp_path / "file")
    for name, score in spt.Sensitivity.load(tmp_path / "file").items():
        assert score.dtype == dtype
        assert torch.equal(score, cast[name])
