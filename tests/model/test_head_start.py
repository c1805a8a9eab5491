"""How large a new head may start: what is too large is scaled, anything else is left to the bit."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from spt_kernels.model import start_small


class Headed(nn.Module):
    """Features and a head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(8, 8), head


def drawn(head: nn.Module, bound: float) -> nn.Module:
    torch.manual_seed(0)
    for parameter in head.parameters():
        nn.init.uniform_(parameter, -bound, bound)
    return head


@pytest.mark.parametrize("head", [nn.Linear(48, 12), nn.Conv2d(48, 12, 1)], ids=["linear", "conv"])
def test_a_large_start_gets_the_size_of_a_linear_and_keeps_its_directions(head: nn.Module) -> None:
    model = Headed(drawn(head, 5.0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert start_small(model) == ("head.weight",)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        if name != "head.weight":
            assert torch.equal(tensor, before[name]), name
    weight = model.get_parameter("head.weight").detach().flatten()
    assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * 48), rel=0.05)
    ratios = weight / before["head.weight"].flatten()
    assert torch.allclose(ratios, ratios[0])


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.6])
def test_any_other_start_is_left_to_the_bit(factor: float) -> None:
    model = Headed(drawn(nn.Linear(48, 12), factor / math.sqrt(48)))
    before = model.get_parameter("head.weight").clone()
    assert start_small(model) == ()
    assert torch.equal(model.get_parameter("head.weight"), before)


def test_a_model_without_a_head_is_left_alone() -> None:
    assert start_small(nn.Sequential(nn.Linear(4, 4))) == ()


def test_only_the_family_that_starts_large_is_changed() -> None:
    torch.manual_seed(0)
    assert start_small(timm.create_model("test_efficientnet", num_classes=3)) == (
        "classifier.weight",
    )
    for name in ("test_vit", "test_convnext", "test_resnet", "test_nfnet"):
        assert start_small(timm.create_model(name, num_classes=3)) == (), name
