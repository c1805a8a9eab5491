"""What is made trainable after a layer was tuned: its gradient, or a refusal by name."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels import AdapterSpec, LoraSpec, Plan
from spt_kernels.layers import (
    LoraConv2d,
    LoraLinear,
    SparseDeltaConv2d,
    SparseDeltaLinear,
    SparseDeltaNorm,
    attach_parameter,
    sparse_deltas,
)
from spt_kernels.model import describe, head_names
from tests.models import tiny_batch, tiny_vit
from tests.task.test_delta import train

INDEX, NONE = torch.tensor([1, 2, 17]), torch.empty(0, dtype=torch.int64)
LORA = LoraSpec(2, ((1, 4),), 8, 1.5, 0.25)
IMAGE, TOKENS = (2, 8, 5, 5), (2, 3, 8)

# what is tuned, what is trained besides, the shape of an input
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], tuple[int, ...]]] = {
    "linear": (lambda: SparseDeltaLinear(nn.Linear(8, 6), INDEX), ("bias",), TOKENS),
    "linear_bias_tuned": (
        lambda: SparseDeltaLinear(nn.Linear(8, 6), NONE, INDEX[:2]),
        ("weight",),
        TOKENS,
    ),
    "linear_of_which_nothing_is_tuned": (
        lambda: SparseDeltaLinear(nn.Linear(8, 6), NONE),
        ("weight", "bias"),
        TOKENS,
    ),
    "lora": (lambda: LoraLinear(nn.Linear(8, 6), LORA), ("weight", "bias"), TOKENS),
    "lora_on_deltas": (
        lambda: LoraLinear(SparseDeltaLinear(nn.Linear(8, 6), INDEX), LORA),
        ("bias",),
        TOKENS,
    ),
    "conv": (lambda: SparseDeltaConv2d(nn.Conv2d(8, 6, 3), INDEX), ("bias",), IMAGE),
    "patches": (
        lambda: SparseDeltaConv2d(nn.Conv2d(8, 6, 2, 2), NONE, INDEX[:2]),
        ("weight",),
        IMAGE,
    ),
    "depthwise": (
        lambda: SparseDeltaConv2d(nn.Conv2d(8, 8, 3, groups=8), NONE, INDEX[:2]),
        ("weight",),
        IMAGE,
    ),
    "lora_1x1": (lambda: LoraConv2d(nn.Conv2d(8, 6, 1), LORA), ("weight", "bias"), IMAGE),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", LAYERS)
def test_its_gradient_is_that_of_the_plain_layer(name: str, autocast: bool) -> None:
    torch.manual_seed(0)
    make, trained, shape = LAYERS[name]
    layer = make()
    plain = copy.deepcopy(layer.plain).requires_grad_(True)  # type: ignore[union-attr, operator]
    for local in trained:
        layer.get_parameter(local).requires_grad_(True)
    x = torch.randn(shape, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, plain_y = layer(F.gelu(x)), plain(F.gelu(x))
    given = torch.randn(y.shape, dtype=y.dtype)  # not of the output, to which a LoRA adds
    y.backward(given)
    plain_y.backward(given)
    for local in trained:
        actual, expected = layer.get_parameter(local).grad, plain.get_parameter(local).grad
        # the plain layer sums 16 bits as it goes
        rtol, atol = (0.02, 0.02) if autocast else (1e-5, 1e-5)
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=local)
    tuned = [n for n, p in layer.named_parameters() if p.requires_grad and n not in trained]
    assert all(layer.get_parameter(n).grad is not None for n in tuned)


def test_a_whole_model_whose_other_parameters_are_trained_besides() -> None:
    model = tiny_vit()
    info, fc1 = describe(model), "blocks.0.mlp.fc1.weight"
    positions = {n: torch.arange(0, what.numel, 7) for n, what in info.items() if "weight" in n}
    del positions[fc1], positions["head.weight"]
    specs = {fc1: LoraSpec(2, ((0, 96),), 24, 1.0, 0.0)}
    spt.apply(model, Plan(positions, specs, info, head=head_names(model)))
    train(model, 16)
    plain = spt.merge(copy.deepcopy(model)).requires_grad_(True)
    expected = {n: p for n, p in plain.named_parameters() if n not in positions}
    for name in expected:
        model.get_parameter(name).requires_grad_(True)
    images, labels = tiny_batch()
    for each in (model, plain):
        each.zero_grad()
        F.cross_entropy(each(images), labels).backward()
    assert len(expected) > 15
    for name, parameter in expected.items():
        own = model.get_parameter(name).grad
        torch.testing.assert_close(own, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        attach_parameter(self, "scale", INDEX[:2])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


TUNED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "linear": (LAYERS["linear"][0], "weight"),
    "linear_bias": (LAYERS["linear_bias_tuned"][0], "bias"),
    "lora": (LAYERS["lora_on_deltas"][0], "weight"),
    "adapter": (
        lambda: spt.AdapterLinear(LAYERS["linear"][0](), AdapterSpec(2, ((0, 6),))),
        "weight",
    ),
    "norm": (lambda: SparseDeltaNorm(nn.LayerNorm(8), INDEX[:2]), "weight"),
    "parameter": (Scaled, "scale"),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["delta_trained", "delta_frozen"])
@pytest.mark.parametrize("name", TUNED)
def test_a_parameter_with_a_delta_is_refused_by_name(name: str, frozen: bool) -> None:
    make, local = TUNED[name]
    layer, x = make(), torch.randn(4, 8)
    layer.__dict__["_spt_name"] = "blocks.3"  # as `apply` leaves it
    delta = sparse_deltas(layer)[local]
    delta.delta.requires_grad_(not frozen)
    delta.target.requires_grad_(True)
    with pytest.raises(RuntimeError, match=rf"blocks\.3\.{local} has a sparse delta and requires"):
        layer(x)
    with torch.no_grad():
        layer(x)  # nothing is trained by it
    delta.target.requires_grad_(False)
    layer(x)


def test_a_convolution_with_a_delta_is_refused_too() -> None:
    layer = LAYERS["conv"][0]()
    layer.get_parameter("weight").requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"SparseDeltaConv2d\.weight has a sparse delta"):
        layer(torch.randn(IMAGE))


def test_all_of_the_input_is_needed_for_a_whole_weight() -> None:
    layer = SparseDeltaLinear(nn.Linear(8, 6), NONE, INDEX[:2])
    assert layer.needed_share() == 0.0
    layer.weight.requires_grad_(True)
    assert layer.needed_share() == 1.0
