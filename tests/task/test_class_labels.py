"""Tasks of other classes on models that say how many they have: timm's and transformers'."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

import spt_kernels as spt
from tests.models import tiny_batch, tiny_vit
from tests.task.test_delta import assert_same_picture, base, make_plan, picture, tuned

NAMES = ["rose", "tulip", "daisy", "iris"]


def distilled(n: int) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    model = VisionTransformerDistilled(**shape, num_classes=5).eval()
    model.reset_classifier(n)
    return model


def test_two_heads_of_timm(tmp_path: Path) -> None:
    path, model = tmp_path / "task.safetensors", distilled(3)
    plan = make_plan(model, "unstructured")
    spt.save_delta(spt.apply(model, plan), path)
    loaded = distilled(7)
    before = picture(loaded)
    spt.load_delta(loaded, path)
    assert loaded.num_classes == 3
    assert loaded(tiny_batch()[0]).shape == (4, 3)
    assert spt.unload(loaded).num_classes == 7
    assert_same_picture(loaded, before)


def test_a_wrapped_model(tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"

    def wrapped(n: int) -> nn.Module:
        model = nn.Module()
        model.backbone = tiny_vit(num_classes=5)
        model.backbone.reset_classifier(n)
        return model

    model = wrapped(7)
    plan = make_plan(model, "unstructured")
    head = ("backbone.head.weight", "backbone.head.bias")
    spt.save_delta(spt.apply(model, replace(plan, head=head)), path)
    loaded = spt.load_delta(wrapped(3), path)
    assert loaded.backbone.num_classes == 7
    assert spt.unload(loaded).backbone.num_classes == 3


def test_a_failed_load_leaves_what_the_model_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "task.safetensors"
    spt.save_delta(tuned("vit", "lora", num_classes=7), path)

    def failing(*_: object) -> None:
        raise RuntimeError("out of memory")

    for name in ("fill", "apply_to_known", "name_classes"):
        model = base("vit", num_classes=3)
        before = picture(model)
        with monkeypatch.context() as patch:
            patch.setattr(f"spt_kernels.task.transfer.{name}", failing)
            with pytest.raises(RuntimeError, match="out of memory"):
                spt.load_delta(model, path)
        assert model.num_classes == 3
        assert_same_picture(model, before)


class Labelled(nn.Module):
    """A classifier as transformers builds them, without transformers."""

    class Config:
        """Its labels."""

        def __init__(self, n: int) -> None:
            self.id2label = {i: f"LABEL_{i}" for i in range(n)}
            self.label2id = {label: i for i, label in self.id2label.items()}
            self.problem_type: str | None = None

    def __init__(self, n: int) -> None:
        super().__init__()
        self.config, self.num_labels = self.Config(n), n
        self.body = base("vit", num_classes=0)
        torch.manual_seed(1)
        self.classifier = nn.Linear(24, n)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.body(images))


def labelled_task(n: int, path: Path, metadata: dict[str, Any] | None = None) -> None:
    model = Labelled(n)
    plan = make_plan(model, "unstructured")
    head = ("classifier.weight", "classifier.bias")
    spt.save_delta(spt.apply(model, replace(plan, head=head)), path, metadata=metadata)


def test_names_of_the_classes_are_those_of_the_task(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    labelled_task(4, paths[0], {"classes": NAMES})
    labelled_task(4, paths[1], {"classes": NAMES[::-1]})
    labelled_task(4, paths[2])
    for n in (4, 9):
        model = Labelled(n)
        own = copy.deepcopy(vars(model.config))
        spt.load_delta(model, paths[0])
        assert model.config.id2label == dict(enumerate(NAMES))
        spt.load_delta(model, paths[1])  # values alone
        assert model.config.id2label == dict(enumerate(NAMES[::-1]))
        twin = copy.deepcopy(model)
        spt.load_delta(model, paths[2])
        assert model.config.id2label == {i: f"LABEL_{i}" for i in range(4)}
        assert model.num_labels == 4
        for one in (model, twin):
            spt.unload(one)
            assert vars(one.config) == own
            assert one.num_labels == n


def test_a_merged_model_keeps_its_labels(tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    labelled_task(4, path, {"classes": NAMES})
    model = spt.merge(spt.load_delta(Labelled(9), path))
    assert model.num_labels == 4
    assert model.config.label2id == {name: i for i, name in enumerate(NAMES)}


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers")


def vit(transformers: Any, n: int) -> Any:
    shape = {"hidden_size": 16, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        **shape, num_hidden_layers=1, num_attention_heads=2, num_labels=n
    )
    return transformers.ViTForImageClassification(config).eval()


def test_a_model_of_transformers(transformers: Any, tmp_path: Path) -> None:
    path, folder = tmp_path / "task.safetensors", tmp_path / "merged"
    images, labels = tiny_batch(num_classes=4)
    model = vit(transformers, 4)
    spt.save_delta(
        spt.apply(model, make_plan(model, "unstructured")), path, metadata={"classes": NAMES}
    )
    loaded = vit(transformers, 10)
    own = loaded.config.to_dict()
    spt.load_delta(loaded, path)
    result = loaded(pixel_values=images, labels=labels)
    torch.testing.assert_close(result.loss, F.cross_entropy(result.logits, labels))
    assert loaded.num_labels == loaded.config.num_labels == 4
    assert spt.unload(loaded).config.to_dict() == own
    assert loaded(pixel_values=images, labels=labels + 5).loss.isfinite()

    spt.merge(spt.load_delta(loaded, path)).save_pretrained(folder)
    again = transformers.ViTForImageClassification.from_pretrained(folder)
    assert [again.config.id2label[i] for i in range(4)] == NAMES
    with torch.no_grad():
        assert torch.equal(again(images).logits, loaded(images).logits)


def test_a_regression_becomes_a_classification_and_back(transformers: Any, tmp_path: Path) -> None:
    path, (images, labels) = tmp_path / "task.safetensors", tiny_batch(num_classes=4)
    model = vit(transformers, 4)
    spt.save_delta(spt.apply(model, make_plan(model, "unstructured")), path)
    loaded = vit(transformers, 1)
    targets = torch.randn(4)
    loss = loaded(pixel_values=images, labels=targets).loss  # which makes it a regression for good
    spt.load_delta(loaded, path)
    result = loaded(pixel_values=images, labels=labels)
    torch.testing.assert_close(result.loss, F.cross_entropy(result.logits, labels))
    spt.unload(loaded)
    assert torch.equal(loaded(pixel_values=images, labels=targets).loss, loss)
