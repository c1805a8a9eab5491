"""Scores measured on a (pretended) card, of every family of models."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import timm
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import spt_kernels as spt

from .on_card import CARD
from .pretend import pretended_card

FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "vit_tiny_patch16_224": (32, {"img_size": 32, "depth": 2, "embed_dim": 48}),
    "swin_tiny_patch4_window7_224": (
        56,
        {"img_size": 56, "depths": (1, 1), "embed_dim": 24, "num_heads": (1, 2)},
    ),
    "convnext_atto": (32, {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
    "resnet18": (32, {"channels": (8, 8, 16, 16)}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_cpu(family: str) -> None:
    pixels, sizes = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(family, num_classes=5, **sizes)
    batch = torch.randn(3, 3, pixels, pixels), torch.tensor([0, 4, 2])
    expected = spt.measure_sensitivity(model, [batch], num_samples=3)
    with pretended_card():
        model.to("cuda")
        found = spt.measure_sensitivity(model, [batch], num_samples=3)
        assert found.fallback == expected.fallback
        assert {score.device for score in found.values()} == {CARD}
        for name, score in expected.items():
            torch.testing.assert_close(found[name].cpu(), score, rtol=1e-3, atol=1e-9)

        spt.apply(model, spt.allocate(found, 500))
        loss = F.cross_entropy(model(batch[0].to("cuda")), batch[1].to("cuda"))
        loss.backward()
        spt.SparseAdamW(spt.param_groups(model), lr=1e-3).step()
        spt.merge(model)


def test_another_batch_costs_few_waits() -> None:
    pixels, sizes = FAMILIES["vit_tiny_patch16_224"]
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes)
    images, target = torch.randn(3, 3, pixels, pixels), torch.tensor([0, 4, 2])
    waits = []
    with pretended_card() as pretence:
        model.to("cuda")
        batch = images.to("cuda"), target.to("cuda")
        for n_batches in (1, 3):
            before = pretence.waits
            spt.measure_sensitivity(model, [batch] * n_batches, num_samples=3 * n_batches)
            waits.append(pretence.waits - before)
    # the range of the labels, two numbers, and whether the loss is finite
    assert waits[1] - waits[0] <= 2 * 3


class Operators(TorchDispatchMode):
    """Counts what is dispatched, views aside: on a card each is a launch, or nearly."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_a_batch_dispatches_one_operator_for_each_use_besides_its_own() -> None:
    pixels, sizes = FAMILIES["vit_tiny_patch16_224"]
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes).eval()
    images, target = torch.randn(3, 3, pixels, pixels), torch.tensor([0, 4, 2])
    counts = []
    with pretended_card():
        model.to("cuda")
        batch = images.to("cuda"), target.to("cuda")
        for n_batches in (1, 2):
            with Operators() as found:
                spt.measure_sensitivity(model, [batch] * n_batches, num_samples=3 * n_batches)
            counts.append(found.counts)
        names = spt.measure_sensitivity(model, [batch], num_samples=3).keys()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        with Operators() as plain:
            F.cross_entropy(model(batch[0]), batch[1]).backward()
    ours = counts[1] - counts[0]
    layers, norms = 4 * 2, 2 * 2 + 1
    assert ours["spt::accumulate_squared_grad"] == layers
    # a bias each, and both vectors of a norm at once
    assert ours["spt::accumulate_squared_vector_grad"] == layers + norms
    products = ("aten::mm", "aten::addmm")
    assert sum(ours[op] for op in products) == sum(plain.counts[op] for op in products) - layers
    # one alias for each use; GELU is made again, its input's graph being there
    own = ours.total() - layers - (layers + norms)
    assert own <= plain.counts.total() + layers + norms


def test_memory_of_a_model_on_a_card() -> None:
    pixels, sizes = FAMILIES["vit_tiny_patch16_224"]
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes)
    expected = spt.estimate_memory(model, (2, 3, pixels, pixels))
    with pretended_card():
        found = spt.estimate_memory(model.to("cuda"), (2, 3, pixels, pixels))
    assert found.by_category == expected.by_category
