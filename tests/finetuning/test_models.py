"""The base model: any timm architecture, weights that fit, a clear word where they do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import DropPath

from spt_kernels.finetuning.base.models import (
    ModelSource,
    build,
    build_empty,
    preprocessing_of,
)

from .pictures_on_disk import TINY, write_weights

NAME = "vit_tiny_patch16_224"


def test_weights_are_loaded_and_a_head_of_other_classes_is_not(tmp_path: Path) -> None:
    source = write_weights(tmp_path / "w.safetensors", num_classes=5)
    saved = load_file(tmp_path / "w.safetensors")
    same, other = build(source, 5), build(source, 3)
    assert not same.head_is_new
    assert other.head_is_new
    for name, tensor in same.model.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    for name, tensor in other.model.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(tensor, saved[name]), name
    assert other.model.head.weight.shape == (3, 24)


def test_the_seed_gives_the_new_head(tmp_path: Path) -> None:
    source = write_weights(tmp_path / "w.safetensors")
    heads = [build(source, 3, seed=seed).model.head.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_unknown_architectures_and_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean vit_tiny_patch16_224"):
        build(ModelSource("vit_tiny_patch16_225"), 3)
    with pytest.raises(ValueError, match=r"cannot be built.*'no_such'"):
        build(ModelSource(NAME, {**TINY, "no_such": 1}), 3)
    with pytest.raises(ValueError, match="expected one of them, got both"):
        ModelSource(NAME, weights="w.pt", pretrained=True)


def test_stochastic_depth_is_there_where_the_architecture_has_it() -> None:
    tiny = ModelSource(NAME, TINY)
    assert build(tiny, 3, drop_path=None).drop_path == 0.1
    assert build(tiny, 3).drop_path == 0.0
    assert build(ModelSource("dla46_c"), 3, drop_path=None).drop_path == 0.0
    with pytest.raises(ValueError, match="drop_path_rate"):
        build(ModelSource("dla46_c"), 3, drop_path=0.2)


def test_no_stochastic_depth_is_none_also_where_the_architecture_has_some_by_itself() -> None:
    small = {"embed_dim": 8, "depths": (1, 1, 1, 2)}
    fasternet = ModelSource("fasternet_t2", small)  # with 0.05
    told = ModelSource("fasternet_t2", {**small, "drop_path_rate": 0.3})
    for source, asked, is_so in (
        (fasternet, 0.0, 0.0),
        (fasternet, None, 0.1),
        (fasternet, 0.2, 0.2),
        (told, None, 0.3),
        (told, 0.0, 0.3),
        (told, 0.2, 0.2),
    ):
        built = build(source, 3, drop_path=asked)
        depths = [m.drop_prob for m in built.model.modules() if isinstance(m, DropPath)]
        assert max(depths, default=0.0) == pytest.approx(is_so)
        assert built.drop_path == is_so


def test_preprocessing_is_the_models_own_unless_asked() -> None:
    model = build(ModelSource(NAME, TINY), 3).model
    form = preprocessing_of(model, std=(0.1, 0.2, 0.3), fit=None)
    assert (form.size, form.mean, form.std) == (16, (0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match=r"this model takes 16, got 32.*img_size=32"):
        preprocessing_of(model, size=32)


def test_the_channels_of_the_images_are_those_of_the_model() -> None:
    grey = build(ModelSource(NAME, {**TINY, "in_chans": 1}), 3).model
    form = preprocessing_of(grey)
    assert (form.mean, form.std) == ((0.5,), (0.5,))
    assert preprocessing_of(grey, mean=(0.1,), std=(0.2,)).mean == (0.1,)
    colour = build(ModelSource(NAME, TINY), 3).model
    with pytest.raises(ValueError, match="mean, std: this model takes images of 3 channels, got 1"):
        preprocessing_of(colour, mean=(0.1,), std=(0.2,))
    with pytest.raises(ValueError, match=r"in_chans: images have 1 channel or 3, .* takes 5"):
        preprocessing_of(build(ModelSource(NAME, {**TINY, "in_chans": 5}), 3).model)
    assert build_empty(ModelSource(NAME, {**TINY, "in_chans": 1}), 3)[1] == (1, 16, 16)


def test_a_new_head_is_started_even_for_as_many_classes(tmp_path: Path) -> None:
    source = write_weights(tmp_path / "w.safetensors", num_classes=5)
    fresh = build(replace(source, new_head=True), 5, seed=2)
    assert fresh.head_is_new
    scratch = build(ModelSource(NAME, TINY), 5, seed=2)
    assert torch.equal(fresh.model.head.weight, scratch.model.head.weight)
    kept = build(source, 5, seed=2).model.state_dict()
    for name, tensor in fresh.model.state_dict().items():
        assert torch.equal(tensor, kept[name]) != name.startswith("head."), name


def test_a_head_that_starts_large_is_shrunk_and_one_that_was_trained_is_not(tmp_path: Path) -> None:
    torch.manual_seed(3)
    trained = timm.create_model("test_efficientnet", num_classes=3)
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    source = ModelSource("test_efficientnet", weights=str(tmp_path / "w.safetensors"))
    kept, fresh = build(source, 3).model, build(replace(source, new_head=True), 3).model
    assert torch.equal(kept.classifier.weight, trained.classifier.weight)
    assert kept.classifier.weight.abs().max() > 0.5  # up to 1 / sqrt(3) for three classes
    for model in (fresh, build(source, 4).model):  # 256 features
        assert model.classifier.weight.abs().max() < 1.2 / 16


def test_an_empty_model_has_shapes_and_no_values() -> None:
    model, shape = build_empty(ModelSource("vit_tiny_patch16_224", {"depth": 1}), 3, 64)
    assert shape == (3, 64, 64)
    assert all(p.is_meta for p in model.parameters())
    full = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3, img_size=64)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in full.named_parameters()
    }


def test_an_empty_convolutional_network_takes_any_size() -> None:
    source = ModelSource("resnet10t")
    assert build_empty(source, 3)[1] == (3, 176, 176)
    assert build_empty(source, 3, 200)[1] == (3, 200, 200)
    with pytest.raises(ValueError, match="image_size: expected at least 1, got 0"):
        build_empty(source, 3, 0)
    with pytest.raises(ValueError, match="timm has no 'resnet10x'"):
        build_empty(ModelSource("resnet10x"), 3, 200)
