"""Made-up scores know of a model what measured ones do: which weights it reads itself."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt
from spt_kernels.memory import estimate_memory, made_up_sensitivity
from spt_kernels.methods import Method

SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}
READERS: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"img_size": 32, **SMALL},
    "eva02_tiny_patch14_224": {"img_size": 28, **SMALL},
    "swinv2_tiny_window8_256": {
        **{"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (1, 1)},
        **{"num_heads": (1, 2), "num_classes": 3},
    },
}
CALLERS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, **SMALL},
    "convnext_atto": {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_classes": 3},
}


def model_of(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    torch.manual_seed(0)
    args = {**READERS, **CALLERS}[name]
    return timm.create_model(name, **args).eval(), (
        3,
        args.get("img_size", 32),
        args.get("img_size", 32),
    )


@pytest.mark.parametrize("name", [*READERS, *CALLERS])
def test_they_know_what_measured_ones_know(name: str) -> None:
    model, shape = model_of(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    made_up = made_up_sensitivity(model, shape)
    images = torch.randn(2, *shape)
    measured = spt.measure_sensitivity(model, [(images, torch.tensor([0, 1]))], num_samples=2)
    assert made_up.info == measured.info
    is_reader = any(what.kind == "functional" for what in made_up.info.values())
    assert is_reader == (name in READERS)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", READERS)
def test_a_step_of_a_model_that_reads_its_weights_is_accounted_for(name: str) -> None:
    model, shape = model_of(name)
    budget = 600
    estimate = estimate_memory(model, (2, *shape), method="spt-lora", budget=budget, rank=1)
    assert estimate.made_up_scores
    assert estimate.peak_bytes > 0
    for method in ("lora", "lora-1"):
        with pytest.raises(ValueError, match=r"nothing can stand for .*attn\.qkv"):
            estimate_memory(model, (2, *shape), method=method)
    plan = spt.allocate(made_up_sensitivity(model, shape), budget, rank=1)
    assert not estimate_memory(model, (2, *shape), plan).made_up_scores


class Both(nn.Module):
    """Calls a layer, and reads its weight besides."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x.mean((2, 3)).to(self.one.weight.dtype))  # to look at is not to read
        return self.head(self.two(x) + F.linear(x, self.two.weight))


def test_a_layer_that_is_called_and_read_is_not_called_alone() -> None:
    kinds = {name: what.kind for name, what in made_up_sensitivity(Both(), (4, 2, 2)).info.items()}
    assert kinds["one.weight"] == "linear"
    assert kinds["two.weight"] == kinds["idle.weight"] == "functional"


def test_scores_of_any_precision_and_of_no_values() -> None:
    model, shape = model_of("beit_base_patch16_224")
    for other in (model.bfloat16(), model.to("meta")):
        kinds = {name: what.kind for name, what in made_up_sensitivity(other, shape).info.items()}
        assert kinds["blocks.0.attn.qkv.weight"] == "functional"
    with pytest.raises(ValueError, match="cannot take"):
        made_up_sensitivity(model, (1, 5, 5))
    assert Method("spt-lora").is_sensitivity_aware
