"""What saved files tell of themselves, and a saved model that is found by that alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import spt_kernels as spt
from spt_kernels.finetuning import Description, Method, ModelSource, Preprocessing, SavedRun, build
from spt_kernels.finetuning.run.description import as_header, kind_of, metadata_of
from spt_kernels.methods import make_plan, tune

from .pictures_on_disk import write_weights

CLASSES = ("owl", "a, b", "wren")
FORM = Preprocessing(16, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), fit="crop", augment="crop-flip")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return write_weights(tmp_path_factory.mktemp("base") / "base.safetensors")


def saved(path: Path, source: ModelSource, name: str, told: Description | None = None) -> Path:
    """What the method called `name` leaves of a tiny model with a head of three classes."""
    method = Method(name)
    model = build(source, 3).model
    tunable = tune(model, method, make_plan(model, method))
    with torch.no_grad():
        for parameter in tunable.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    told = told or Description(source, CLASSES, FORM, method)
    tunable.save(path, told.to_json())
    return path


# one method for each kind of file
KINDS = {"bias": "task", "prompt-deep": "trained", "full": "state-dict"}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_alone_is_enough(name: str, base: ModelSource, tmp_path: Path) -> None:
    file = saved(tmp_path / "alone.safetensors", base, name)
    assert kind_of(file) == KINDS[name]
    told = Description.of(file)
    assert told == Description(base, CLASSES, replace(FORM, augment="none"), Method(name))
    found = SavedRun.find(file)
    assert (found.classes, found.num_classes, found.form) == (CLASSES, 3, told.form)
    assert found.is_whole_model == (name == "full")
    scores = found.load()(torch.zeros(1, 3, 16, 16))
    assert scores.shape == (1, 3)
    assert not torch.equal(scores, build(base, 3).model(torch.zeros(1, 3, 16, 16)))


@pytest.mark.parametrize("name", KINDS)
def test_the_same_model_gives_the_same_bytes(name: str, base: ModelSource, tmp_path: Path) -> None:
    one, other = (saved(tmp_path / f"{i}.safetensors", base, name) for i in range(2))
    assert one.read_bytes() == other.read_bytes()


def test_a_description_survives_as_json(base: ModelSource) -> None:
    told = Description(base, CLASSES, replace(FORM, augment="none"), Method("lora", rank=4))
    assert Description.from_json(json.loads(json.dumps(told.to_json()))) == told
    assert Description.from_json({}) == Description()
    # others may say more, and less, in the same places
    sparse = {
        "model": {"name": "resnet18", "source": "a zoo"},
        "preprocessing": {"size": [64, 64], "mean": [0], "std": [1], "crop_pct": 0.9},
        "method": "mine",
        "author": ["someone"],
    }
    read = Description.from_json(sparse)
    assert read.model == ModelSource("resnet18")
    assert read.form is not None
    assert (read.form.size, read.form.mean) == (64, (0,))
    assert read.method is None


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"preprocessing": {"size": [64, 32], "mean": [0], "std": [1]}}, "square images"),
        ({"preprocessing": {"mean": [0], "std": [1]}}, "size"),
        ({"preprocessing": {"size": 8, "mean": [0], "std": [0]}}, "std: expected"),
        ({"model": "resnet18"}, "description"),
        ({"method": {"name": "best"}}, "method: expected one of"),
    ],
)
def test_a_malformed_description_names_the_file(
    told: dict[str, object], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, file, as_header(told))
    with pytest.raises(spt.DeltaFormatError, match=words) as error:
        Description.of(file)
    assert str(file) in str(error.value)


def test_headers_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    for text in ("{", "[]"):
        save_file({"a": torch.zeros(1)}, file, {"spt_kernels": text})
        with pytest.raises(spt.DeltaFormatError, match="no JSON"):
            Description.of(file)
    save_file({"a": torch.zeros(1)}, file, {"format": "pt"})
    assert metadata_of(file) == {}
    plan = make_plan(build(ModelSource("vit_tiny_patch16_224"), 2).model, Method("linear"))
    assert plan is not None
    plan.save(tmp_path / "plan")
    with pytest.raises(ValueError, match="got a plan"):
        SavedRun.find(tmp_path / "plan")


def test_metadata_of_ones_own_stay_beside(base: ModelSource, tmp_path: Path) -> None:
    model = build(base, 3).model
    spt.apply(model, make_plan(model, Method("bias")))
    own = {"classes": list(CLASSES), "licence": {"name": "MIT"}}
    spt.save_delta(model, tmp_path / "t.safetensors", metadata=own)
    assert metadata_of(tmp_path / "t.safetensors") == own
    with pytest.raises(ValueError, match=r"model: .* does not tell its base model"):
        SavedRun.find(tmp_path / "t.safetensors")
    assert SavedRun.find(tmp_path / "t.safetensors", base).classes == CLASSES


def test_a_config_beside_is_of_its_own_run_alone(base: ModelSource, tmp_path: Path) -> None:
    """A file that was put into another run's folder keeps its own classes."""
    job = {
        "model": {"name": base.name, "args": base.args, "weights": base.weights},
        "images": {"root": "there", "classes": []},
        "method": {"name": "bias"},
        "recipe": {},
        "form": {},
        "sensitivity": None,
        "plan": None,
    }
    form = {"size": 16, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "fit": "crop"}
    config = {"job": job, "classes": ["x", "y", "z"], "preprocessing": form}
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = saved(tmp_path / "task.safetensors", base, "bias")
    assert SavedRun.find(file).job is None
    assert SavedRun.find(tmp_path).classes == CLASSES
    config["classes"] = list(CLASSES)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = SavedRun.find(file)
    assert found.job is not None
    assert found.job.images.root == "there"
    # a file of before it told anything goes by the config
    saved(file, base, "bias", Description())
    found = SavedRun.find(file)
    assert (found.classes, found.form) == (CLASSES, replace(FORM, augment="none"))


def test_base_weights_that_moved(base: ModelSource, tmp_path: Path) -> None:
    gone = replace(base, weights=str(tmp_path / "gone" / "base.safetensors"))
    told = Description(gone, CLASSES, FORM, Method("bias"))
    file = saved(tmp_path / "task.safetensors", base, "bias", told)
    with pytest.raises(ValueError, match=r"weights: .*gone.* is not there; name the file"):
        SavedRun.find(file).load()
    assert base.weights is not None
    SavedRun.find(file, weights=base.weights).load()
    save_file(load_file(base.weights), tmp_path / "base.safetensors")
    assert SavedRun.find(file).model.weights == str(tmp_path / "base.safetensors")
    SavedRun.find(file).load()


def test_a_whole_model_is_never_given_another_head(base: ModelSource, tmp_path: Path) -> None:
    """A head of other classes would be left out, and a random one be evaluated."""
    told = Description(base, (*CLASSES, "gull"), FORM)
    file = saved(tmp_path / "model.safetensors", base, "full", told)
    with pytest.raises(ValueError, match="its head is not of 4 classes"):
        SavedRun.find(file).load()
    # one that tells nothing has as many classes as its head has rows
    file = saved(tmp_path / "plain.safetensors", base, "full", Description())
    with pytest.raises(ValueError, match="does not tell its base model"):
        SavedRun.find(file)
    found = SavedRun.find(file, replace(base, weights=None))
    assert (found.num_classes, found.classes) == (3, ())
    assert found.load()(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
