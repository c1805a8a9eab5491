"""Layers that a plan leaves alone: the same to the bit, and nothing kept that no gradient reads."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spt_kernels import Plan, apply, merge, unload
from spt_kernels.layers import FrozenConv2d, FrozenLinear, freeze_layer
from spt_kernels.model import describe, head_names
from spt_kernels.ops.launching import as_on_card
from spt_kernels.task.transfer import train_besides
from tests.models import tiny_batch, tiny_convnext, tiny_vit


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Every storage that autograd holds for a backward, by address."""

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.bytes[storage._cdata] = storage.nbytes()
        return tensor

    def besides(self, *known: Tensor | None) -> int:
        own = {t.untyped_storage()._cdata for t in known if t is not None}
        return sum(size for address, size in self.bytes.items() if address not in own)


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 20), (3, 5, 12)),
    "linear-no-bias": (lambda: nn.Linear(12, 20, bias=False), (7, 12)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 7, padding=3, groups=6), (2, 6, 9, 9)),
    "same": (lambda: nn.Conv2d(6, 8, 3, padding="same"), (2, 6, 9, 9)),
    "reflect": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 9, 9)),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", LAYERS)
def test_same_bits_and_nothing_kept(name: str, autocast: bool) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = make().requires_grad_(False)
    frozen = copy.deepcopy(plain)
    freeze_layer(frozen)
    assert isinstance(frozen, (FrozenLinear, FrozenConv2d))
    results = []
    for layer in (plain, frozen):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        saved = Saved()
        with saved, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
        results.append((y, x.grad, saved.besides(layer.weight, layer.bias)))
    (y, grad, kept), (own_y, own_grad, own_kept) = results
    assert torch.equal(y, own_y)
    assert y.dtype == own_y.dtype
    assert torch.equal(grad, own_grad)
    # reflection itself keeps what it reflects
    assert own_kept == (x.nbytes if name == "reflect" else 0)
    # plain Linears keep no more than their weight where nothing is cast
    assert (kept > 0) == (autocast or "linear" not in name)


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_what_is_trained_after_all_gets_its_gradient(name: str) -> None:
    make, shape = LAYERS[name]
    layer = make().requires_grad_(False)
    freeze_layer(layer)
    layer.weight.requires_grad_(True)
    x = torch.randn(shape, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum().backward()
    assert layer.weight.grad is not None
    assert x.grad is not None


def test_on_a_card_a_weight_that_comes_cast_gives_the_same_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    multiply = torch.mm

    def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """A card's, which can widen its result."""
        return multiply(left, right) if out_dtype is None else left.float() @ right.float()

    monkeypatch.setattr(torch, "mm", mm)
    torch.manual_seed(0)
    layer = nn.Linear(12, 20).requires_grad_(False)
    layer.weight.data = layer.weight.bfloat16().float()
    as_it_comes = copy.deepcopy(layer)
    as_it_comes.weight.data = layer.weight.bfloat16()  # as an offloaded block's
    found = []
    for each in (layer, as_it_comes):
        freeze_layer(each)
        x = torch.randn(7, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with as_on_card(), torch.autocast("cpu", torch.bfloat16):
            each(x).float().pow(2).sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    assert torch.equal(*found)
    assert not torch.equal(found[0], found[0].bfloat16().float())  # nor was it rounded


def test_one_image_without_a_batch() -> None:
    conv = nn.Conv2d(3, 4, 3).requires_grad_(False)
    expected = conv(torch.ones(3, 5, 5))
    freeze_layer(conv)
    assert torch.equal(conv(torch.ones(3, 5, 5, requires_grad=True)), expected)


class Sealed(nn.Linear):
    """Its class cannot be exchanged."""

    def __init_subclass__(cls) -> None:
        raise TypeError("sealed")


def test_a_class_that_does_not_allow_it_stays() -> None:
    layer = Sealed(2, 2)
    freeze_layer(layer)
    assert type(layer) is Sealed


# ---- in a model


def plan_for(model: nn.Module, *names: str) -> Plan:
    info = describe(model)
    return Plan({name: torch.arange(3) for name in names}, {}, info, head=head_names(model))


def test_a_plan_leaves_the_head_and_what_it_tunes() -> None:
    model = tiny_convnext()
    planned = "stages.1.blocks.0.mlp.fc1"
    apply(model, plan_for(model, f"{planned}.weight"))
    frozen = {n for n, m in model.named_modules() if isinstance(m, (FrozenLinear, FrozenConv2d))}
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    early = ("stem.", "stages.0.", "stages.1.downsample.", "stages.1.blocks.0.conv_dw")
    assert frozen == {n for n in layers if not n.startswith(early)} - {planned, "head.fc"}
    assert set(model.state_dict()) - set(tiny_convnext().state_dict()) == {
        f"{planned}.{name}" for name in ("delta", "index", "original")
    }
    again = pickle.loads(pickle.dumps(model))
    assert {type(m) for m in again.modules()} == {type(m) for m in model.modules()}


@pytest.mark.parametrize("leave", [merge, unload])
def test_merging_and_unloading_make_them_plain(leave: Any) -> None:
    model = tiny_convnext()
    kinds = {name: type(module) for name, module in model.named_modules()}
    leave(apply(model, plan_for(model, "stages.0.blocks.0.mlp.fc1.weight")))
    assert {name: type(module) for name, module in model.named_modules()} == kinds


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_a_model_learns_the_same_to_the_bit(autocast: bool) -> None:
    for make, size in ((tiny_vit, 16), (tiny_convnext, 32)):
        gradients = []
        for plain in (False, True):
            model = make()
            name = next(n for n, i in describe(model).items() if i.takes_modules)
            apply(model, plan_for(model, name))
            if plain:
                for module in model.modules():
                    if isinstance(module, (FrozenLinear, FrozenConv2d)):
                        module.__class__ = module._plain_class
            images, labels = tiny_batch(size=size)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model.train()(images), labels)
            loss.backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert gradients[0].keys() == gradients[1].keys()
        assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_of_them_can_be_trained_whole_later(dtype: torch.dtype) -> None:
    model = tiny_vit().to(dtype)
    kinds = {name: type(module) for name, module in model.named_modules()}
    apply(model, plan_for(model, "blocks.0.mlp.fc1.weight"))
    train_besides(model, ["blocks.1.mlp.fc2.weight"])
    images, labels = tiny_batch()
    F.cross_entropy(model(images.to(dtype)), labels).backward()
    trained = dict(model.named_parameters())
    suffix = "" if dtype == torch.float32 else "_fp32"
    assert trained[f"blocks.1.mlp.fc2.weight{suffix}"].grad is not None
    unload(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
