"""The account of what is tunable, told without values, against a measurement of the same model."""

from __future__ import annotations

import pytest
import torch
from timm.models.beit import Beit
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

import spt_kernels as spt
from tests.models import _spread, tiny_batch, tiny_convnext, tiny_vit


def tiny_beit() -> nn.Module:
    return Beit(16, 4, embed_dim=24, depth=1, num_heads=3, num_classes=5)


def tiny_swin_v2() -> nn.Module:
    return SwinTransformerV2(
        img_size=16, patch_size=4, window_size=4, embed_dim=8, depths=(1,), num_heads=(2,)
    )


class Odd(nn.Module):
    """Convolutions, a use that nothing sees, a layer that nothing calls, and two that are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2)
        self.turned, self.unused = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.tied, self.again = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.again.weight = self.tied.weight
        self.top = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.first(x)).mean((2, 3)) @ self.turned.weight.T
        return self.top(self.again(self.tied(x)))


MODELS = {
    "vit": (tiny_vit, 16),
    "convnext": (tiny_convnext, 32),
    "beit": (tiny_beit, 16),
    "swin-v2": (tiny_swin_v2, 16),
    "odd": (Odd, 16),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_says_what_a_measurement_does(name: str) -> None:
    make, size = MODELS[name]
    torch.manual_seed(0)
    model = _spread(make())
    images, labels = tiny_batch(2, size=size)
    measured = spt.measure_sensitivity(
        model, [(images, labels)], head="top" if name == "odd" else None, progress=False
    )
    shares = spt.tunable_parts(model, (3, size, size), head="top" if name == "odd" else None)
    assert sum(share.numel for share in shares) == sum(p.numel() for p in model.parameters())

    expected: dict[tuple[str, bool], int] = {}
    for parameter, what in measured.info.items():
        if parameter in measured.fallback:
            how = "one by one"
        else:
            how = "not reached" if parameter in measured.idle else "in batches"
        key = how, what.takes_modules
        expected[key] = expected.get(key, 0) + 1
    actual: dict[tuple[str, bool], int] = {}
    for share in shares:
        if share.measured != "no":
            key = share.measured, "LoRA" in share.takes
            actual[key] = actual.get(key, 0) + share.tensors
    assert actual == expected


def test_what_is_frozen_and_why() -> None:
    shares = {share.kind: share for share in spt.tunable_parts(tiny_vit(), (3, 16, 16))}
    assert shares["stem"].why == shares["token, table or scale"].why == "frozen, or included"
    assert (shares["head"].takes, shares["head"].tensors) == ("all of it", 2)
    assert not shares["Linear"].why
    tied = [s for s in spt.tunable_parts(Odd(), (3, 16, 16)) if "shared" in s.why]
    assert [(s.kind, s.tensors, s.numel, s.takes) for s in tied] == [("Linear", 1, 64, "nothing")]


def test_of_a_model_without_values_that_stays_as_it_is() -> None:
    with torch.device("meta"):
        model = tiny_convnext()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    classes = {name: type(p) for name, p in model.named_parameters()}
    assert spt.tunable_parts(model, (3, 32, 32)) == spt.tunable_parts(tiny_convnext(), (3, 32, 32))
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert classes == {name: type(p) for name, p in model.named_parameters()}


def test_of_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=48,
        image_size=16, patch_size=4, num_labels=5,
    )  # fmt: skip
    shares = spt.tunable_parts(transformers.ViTForImageClassification(config), (3, 16, 16))
    matrices = {share.kind: share for share in shares}["Linear"]
    assert (matrices.tensors, matrices.measured) == (6, "in batches")
    assert matrices.takes == "LoRA, Adapter, entries"


def test_images_that_the_model_cannot_take_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot take"):
        spt.tunable_parts(tiny_vit(), (3, 20, 20))
