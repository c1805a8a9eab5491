"""Gradients with parts computed again are those without, to the bit, whatever the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spt_kernels import recompute
from tests.models import tiny_batch, tiny_convnext, tiny_resnet, tiny_swin, tiny_vit

from .steps import take_step, tuned

Whats = tuple[str | tuple[str, ...], ...]

_EVERY: Whats = ("mlp", "qkv", "attention", "block", ("mlp", "qkv"))
_UNFUSED: Whats = ("mlp", "attention", "block")  # attention with a mask or dropout, on a CPU


def dropping_vit() -> nn.Module:
    """A ViT that draws random numbers wherever timm's can."""
    model = tiny_vit()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return model


FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, Whats]] = {
    "vit": (tiny_vit, 16, _EVERY),
    "vit-dropout": (dropping_vit, 16, _UNFUSED),
    "swin": (tiny_swin, 32, _UNFUSED),
    "convnext": (tiny_convnext, 32, ("mlp", "block")),
    "resnet": (tiny_resnet, 32, ("block",)),
    "vit-lora": (lambda: tuned(tiny_vit(), "lora"), 16, _EVERY),
    "vit-lora-dropout": (lambda: tuned(dropping_vit(), "lora", 0.2), 16, _UNFUSED),
    "vit-adapter": (lambda: tuned(tiny_vit(), "adapter"), 16, _EVERY),
    "vit-entries": (lambda: tuned(tiny_vit(), None), 16, _EVERY),
    "swin-entries": (lambda: tuned(tiny_swin(), None), 32, _UNFUSED),
    "convnext-lora": (lambda: tuned(tiny_convnext(), "lora"), 32, ("mlp", "block")),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_the_same_bits(name: str, autocast: bool) -> None:
    make, size, whats = FAMILIES[name]
    model, batch = make().train(), tiny_batch(2, size=size)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def step():
        for name, buffer in model.named_buffers():  # what batch norms count
            buffer.copy_(buffers[name])
        outcome = take_step(model, batch, autocast=autocast)
        return outcome, {name: buffer.clone() for name, buffer in model.named_buffers()}

    plain, counted = step()
    for what in whats:
        assert recompute(model, what)
        again, counted_again = step()
        assert again.is_same_as(plain), what
        assert all(torch.equal(b, counted_again[n]) for n, b in counted.items()), what


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", ["ViT", "Dinov2"])
def test_models_of_transformers(name: str, autocast: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "num_labels": 5}
    sizes = {"intermediate_size": 36, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**shape, **sizes)
    inner = getattr(transformers, f"{name}ForImageClassification")(config).train()
    model, batch = Logits(inner), tiny_batch(2, size=8)
    plain = take_step(model, batch, autocast=autocast)
    for what in _EVERY:
        assert recompute(inner, what)
        assert take_step(model, batch, autocast=autocast).is_same_as(plain), what


class Logits(nn.Module):
    """What a model of transformers makes of images alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_a_model_of_peft(autocast: bool) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        target_modules=["qkv", "fc1", "fc2"], r=2, lora_dropout=0.1, init_lora_weights=False
    )
    model, batch = peft.get_peft_model(tiny_vit(), config).train(), tiny_batch(2)
    plain = take_step(model, batch, autocast=autocast)
    for what in _EVERY:
        assert recompute(model, what)
        assert take_step(model, batch, autocast=autocast).is_same_as(plain), what
