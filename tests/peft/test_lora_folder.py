"""A LoRA that PEFT alone loads, and computes the same with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft import PeftModel, get_peft_model
from torch import nn

import spt_kernels as spt
from spt_kernels.peft import SptConfig, export_lora
from tests.models import tiny_vit

from .small import output, plan, sensitivity, train


def lora_only(found: spt.Plan) -> spt.Plan:
    return dataclasses.replace(found, unstructured={})


def uneven() -> spt.Plan:
    """LoRA on q and v of a fused qkv, on one range alone, and on a whole matrix of other scale."""
    info = sensitivity().info
    names = [f"blocks.{i}.attn.qkv.weight" for i in range(2)] + ["blocks.1.mlp.fc2.weight"]
    rows: list[Any] = [((0, 24), (48, 72)), ((24, 48),), ((0, 24),)]
    widths = [info[name].shape[1] for name in names]
    specs = {
        name: spt.LoraSpec(2, own, width, scale, dropout=0.0)
        for name, own, width, scale in zip(names, rows, widths, (1.0, 0.5, 2.0), strict=True)
    }
    return dataclasses.replace(plan(), unstructured={}, structured=specs, budget=1200)


def test_peft_computes_what_the_model_does(tmp_path: Path) -> None:
    model = train(spt.apply(tiny_vit(), uneven()), lr=0.1)
    export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path)
    assert type(loaded.base_model).__name__ == "LoraModel"
    assert not torch.allclose(output(model), output(tiny_vit()), atol=1e-2)
    torch.testing.assert_close(output(loaded), output(model))
    torch.testing.assert_close(output(loaded.merge_and_unload()), output(model))


def test_from_a_peft_model(tmp_path: Path) -> None:
    model = train(get_peft_model(tiny_vit(), SptConfig(plan=uneven())))
    export_lora(model, tmp_path / "new" / "folder")
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "new" / "folder")
    torch.testing.assert_close(output(loaded), output(model))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 10, 1, stride=2)
    layers = first, nn.GELU(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 5)
    model = nn.Sequential(*layers)
    return model.eval()


def test_convolutions_of_single_pixels(tmp_path: Path) -> None:
    model = convolutions()
    scores = {"2.weight": torch.ones(10, 12, 1, 1)}
    found = spt.allocate(spt.Sensitivity.from_tensors(scores, num_samples=1), 44, rank=2)
    found = dataclasses.replace(lora_only(found), head=("5.weight", "5.bias"), head_source="given")
    assert found.structured.keys() == {"2.weight"}
    train(spt.apply(model, found), lr=0.1)
    export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(convolutions(), tmp_path)
    torch.testing.assert_close(output(loaded), output(model))


class Nested(nn.Module):
    """Layers whose names end in those of others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(48, 8)
        self.inner = nn.ModuleDict({"fc": nn.Linear(8, 8), "out": nn.Linear(8, 8)})
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.fc(x[:, :, :4, :4].flatten(1)))
        scores: torch.Tensor = self.head(self.inner["out"](torch.tanh(self.inner["fc"](hidden))))
        return scores


def nested_plan(specs: dict[str, tuple[int, float]], head: str = "head") -> spt.Plan:
    """LoRA of a rank and a scale on some layers of a `Nested`."""
    widths = {"fc": 48, "inner.fc": 8, "inner.out": 8}
    scores = {f"{name}.weight": torch.ones(8, widths[name]) for name in specs}
    found = spt.allocate(spt.Sensitivity.from_tensors(scores, num_samples=1), 16, rank=1)
    structured = {
        f"{name}.weight": spt.LoraSpec(rank, ((0, 8),), widths[name], scale, dropout=0.0)
        for name, (rank, scale) in specs.items()
    }
    return dataclasses.replace(
        lora_only(found),
        structured=structured,
        budget=1000,
        head=(f"{head}.weight", f"{head}.bias"),
        head_source="given",
    )


@pytest.mark.parametrize(
    "specs",
    [
        {"fc": (1, 1.0), "inner.fc": (1, 2.0)},
        {"fc": (1, 2.0), "inner.fc": (2, 1.0), "inner.out": (1, 2.0)},
        {"fc": (2, 1.0), "inner.out": (1, 2.0)},
    ],
    ids=["scales", "ranks", "one of them"],
)
def test_a_name_that_others_end_in_stands_for_itself(specs: Any, tmp_path: Path) -> None:
    model = train(spt.apply(Nested(), nested_plan(specs)), lr=0.1)
    export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(Nested(), tmp_path)
    torch.testing.assert_close(output(loaded), output(model))
    layers = {n.partition(".lora_A")[0] for n, _ in loaded.named_parameters() if ".lora_A" in n}
    assert layers == {f"base_model.model.{name}" for name in specs}


def test_a_packed_weight_has_the_shape_of_its_matrix(tmp_path: Path) -> None:
    Linear4bit = pytest.importorskip("bitsandbytes.nn").Linear4bit
    model = tiny_vit()
    info = sensitivity().info["blocks.1.mlp.fc2.weight"]
    layer = Linear4bit(info.shape[1], info.shape[0], quant_type="nf4")
    layer.load_state_dict(model.blocks[1].mlp.fc2.state_dict())
    model.blocks[1].mlp.fc2 = layer.to("cpu")
    spt.apply(model, uneven())
    export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path)  # onto floats, which have that shape
    assert loaded.base_model.model.blocks[1].mlp.fc2.lora_B["default"].weight.shape[0] == 24


def test_what_is_tied_and_trained_whole_is_refused(tmp_path: Path) -> None:
    model = Nested()
    model.inner["out"].weight = model.inner["fc"].weight
    spt.apply(model, nested_plan({"fc": (1, 1.0)}, head="inner.fc"))
    with pytest.raises(ValueError, match=r"fc.weight is trained whole and tied to inner.out.wei"):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_what_peft_has_no_place_for_is_refused_or_left_out_when_told(tmp_path: Path) -> None:
    entries = {"blocks.0.norm1.weight": torch.tensor([1, 2])}
    model = train(spt.apply(tiny_vit(), dataclasses.replace(uneven(), unstructured=entries)))
    with pytest.raises(ValueError, match="sparse: 2 single entries are trained besides"):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    export_lora(model, tmp_path / "lora", sparse="leave out")
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "lora")
    with torch.no_grad():
        norm = model.blocks[0].norm1
        norm.weight_delta.zero_()
    torch.testing.assert_close(output(loaded), output(model))


@pytest.mark.parametrize(
    ("found", "options", "match"),
    [
        (lambda: plan(structured="adapter"), {"sparse": "leave out"}, "has an Adapter"),
        (lambda: plan(structured=None), {"sparse": "leave out"}, "has no LoRA"),
        (plan, {"sparse": "drop"}, "sparse must be"),
        (
            lambda: dataclasses.replace(uneven(), head=("cls_token",), head_source="given"),
            {},
            "cls_token is trained whole",
        ),
    ],
    ids=["adapter", "single entries", "option", "token"],
)
def test_other_plans_are_refused(found: Any, options: Any, match: str, tmp_path: Path) -> None:
    model = spt.apply(tiny_vit(), found())
    with pytest.raises(ValueError, match=match):
        export_lora(model, tmp_path / "lora", **options)
    assert not (tmp_path / "lora").exists()


def test_a_plain_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not tuned"):
        export_lora(tiny_vit(), tmp_path)
