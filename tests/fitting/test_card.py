"""Times by a card's figures, against steps that an H100 took."""

from __future__ import annotations

import pytest
import timm
import torch

from spt_kernels.fitting import CARDS, card_named
from spt_kernels.memory import Call, Rehearsal, Work

# kernel times of a step of a ViT-B/16 on 64 images, ms: one H100 80GB HBM3, torch 2.11
MEASURED = {
    ("full", "bf16-autocast"): 28.6,
    ("lora-16", "fp32"): 125.8,  # and it gives 28.1 of 28.6, 23.1 of 23.6, 121 of 126, 171 of 168
}


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    return timm.create_model("vit_base_patch16_224", num_classes=100)


@pytest.mark.parametrize(("method", "dtype"), MEASURED)
def test_steps_of_a_vit_b(vit: torch.nn.Module, method: str, dtype: str) -> None:
    rehearsal = Rehearsal(vit, method=method, dtype=dtype, image_shape=(3, 224, 224))
    _, work = rehearsal.with_work((64, 3, 224, 224))
    told = 1e3 * CARDS["H100"].seconds_of(work, captured=True)
    assert told == pytest.approx(MEASURED[method, dtype], rel=0.05)


def test_work_of_a_product_by_hand() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(512, 256, bias=False))
    how = {"loss_fn": lambda y, _: y.sum(), "optimizer": "none", "device": "cpu"}
    rehearsal = Rehearsal(model, image_shape=(512,), **how)
    _, work = rehearsal.with_work((1000, 512))
    one = 2 * 1000 * 512 * 256
    assert work.flops == 2 * one  # forward, and the gradient of the weight; the input needs none
    assert max(work.calls, key=lambda call: call.flops).dtype is torch.float32


def test_a_call_takes_what_is_longest() -> None:
    card = card_named("NVIDIA GeForce RTX 3090")
    assert card is CARDS["RTX 3090"]
    products = Work({Call(10**12, torch.float32, 1): 3})
    assert card.seconds_of(products) == pytest.approx(3 / (35.6 * 0.635))
    narrow = Work({Call(10**12, torch.bfloat16, 1): 1})
    assert card.seconds_of(narrow) == pytest.approx(1 / (71 * 0.4))
    moves = Work({Call(0, None, 10**9): 1})
    assert card.seconds_of(moves) == pytest.approx(1 / (936 * 0.825))
    many = Work({Call(0, None, 8): 1000})
    assert card.seconds_of(many) == pytest.approx(1000 * 27e-6)  # its host
    assert card.seconds_of(many, captured=True) == pytest.approx(1000 * 5e-6)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("rtx 4090", "RTX 4090"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA GeForce RTX 3070 Ti", "RTX 3070"),
        ("rtx 3070ti", "RTX 3070"),
    ],
)
def test_names(name: str, card: str) -> None:
    assert card_named(name).name == card


@pytest.mark.parametrize("name", ["abacus", "NVIDIA L40S", "NVIDIA RTX A1000 Laptop GPU"])
def test_an_unknown_card(name: str) -> None:
    with pytest.raises(ValueError, match=rf"card: expected one of RTX 3060, .*, got '{name}'"):
        card_named(name)
