"""Blocks that are called, or write, in unusual ways have the gradients that they have without."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spt_kernels.recomputation import recompute
from spt_kernels.recomputation.frame import Frame
from spt_kernels.recomputation.region import LastNorm

WIDTH = 16
PARTS = ["mlp", "qkv", "attention", "block"]


class ScaledNorm(nn.LayerNorm):
    """A norm whose gain each call may say."""

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        return super().forward(x) * gain


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Of a transformer; `adapt` stands between a norm and what it is for."""

    def __init__(self, adapt: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.adapt = adapt
        self.norm1, self.norm2 = ScaledNorm(WIDTH), ScaledNorm(WIDTH)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.adapt(self.norm1, x))
        return x + self.mlp(self.adapt(self.norm2, x))


class Net(nn.Module):
    def __init__(self, adapt: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Block(adapt) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


def plainly(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x)


def scaled_in_place(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x).mul_(1.5)


def told_a_gain(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x, gain=2.0)


def gradients(model: nn.Module) -> list[Tensor]:
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same_gradients(model: nn.Module, what: str) -> None:
    plain = gradients(model)
    recompute(model, what)
    again = gradients(model)
    assert len(plain) == len(again) >= 10
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("what", PARTS)
@pytest.mark.parametrize("adapt", [scaled_in_place, told_a_gain])
def test_a_norm_that_is_not_all_there_is_between(adapt: Any, what: str) -> None:
    assert_same_gradients(Net(adapt), what)


def test_a_norm_that_is_called_plainly_is_made_again() -> None:
    norm, noted = nn.LayerNorm(WIDTH), LastNorm()
    noted.attach([norm])
    x = torch.randn(2, WIDTH, requires_grad=True)
    y = norm(x)
    call = noted.take((y,), {})
    assert call is not None
    assert call.x is x
    norm._forward_hooks.clear()
    norm.register_forward_hook(noted.note)  # as models of earlier versions have it
    y = norm(x)
    assert noted.take((), {"x": y}) is not None


class Features(dict[str, Tensor]):
    """A class of dictionaries that torch does not take apart."""


class Listed(list[Tensor]):
    """The same of lists."""


class Wrapped(Block):
    """A block whose input lies in an object, which gets what it makes as well."""

    def __init__(self, read: Callable[[Any], Tensor], write: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(plainly)
        self.read, self.write = read, write

    def forward(self, held: Any) -> Any:
        return self.write(held, super().forward(self.read(held)))


class WrappedNet(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any], read: Any, write: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.read, self.embed = make, read, nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Wrapped(read, write) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        held = self.make(self.embed(x))
        for block in self.blocks:
            held = block(held) or held
        return self.read(held)


def replaced(held: Any, x: Tensor) -> Any:
    held.x = x


FINE = {
    "dictionary": (lambda x: Features(x=x), lambda d: d["x"], lambda d, x: Features(x=x)),
    "list": (lambda x: Listed([x]), lambda d: d[0], lambda d, x: Listed([x])),
    "object": (lambda x: SimpleNamespace(x=x), lambda d: d.x, lambda d, x: SimpleNamespace(x=x)),
    "nothing-returned": (lambda x: [x], lambda d: d[-1], lambda d, x: d.append(x)),
}
CHANGED = {
    "dictionary": (lambda x: Features(x=x), lambda d: d["x"], lambda d, x: d.update(x=x)),
    "list": (lambda x: Listed([x]), lambda d: d[-1], lambda d, x: d.append(x)),
    "object": (lambda x: SimpleNamespace(x=x), lambda d: d.x, replaced),
}


@pytest.mark.parametrize("case", FINE)
def test_inputs_in_objects(case: str) -> None:
    assert_same_gradients(WrappedNet(*FINE[case]), "block")


@pytest.mark.parametrize("case", CHANGED)
def test_an_object_that_a_block_changes_is_an_error(case: str) -> None:
    model = WrappedNet(*CHANGED[case])
    assert gradients(model)
    recompute(model, "block")
    with pytest.raises(RuntimeError, match=r"blocks\.0 changes the \w+ that it is called with"):
        gradients(model)
    recompute(model, "mlp")
    assert gradients(model)


class GraphLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(WIDTH, WIDTH), nn.GELU()

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return x + self.act(torch.sparse.mm(edges, self.fc(x)))


class GraphNet(nn.Module):
    """Layers that are called with a sparse tensor beside their features."""

    def __init__(self, compressed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        edges = (torch.eye(12) + torch.eye(12).roll(1, 0)).to_sparse()
        self.edges = edges.to_sparse_csr() if compressed else edges
        self.embed = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(GraphLayer() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(0, 1))
        for layer in self.layers:
            x = layer(x, self.edges)
        return x


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("compressed", [False, True])
def test_sparse_arguments(compressed: bool) -> None:
    assert_same_gradients(GraphNet(compressed), "block")


def test_random_numbers_are_drawn_where_features_are() -> None:
    module, scale, features = nn.Identity(), torch.ones(()), torch.ones(2, device="meta")
    assert Frame("block", module, (scale, features), {}).device.type == "meta"
    assert Frame("block", module, (scale,), {"x": [features]}).device.type == "meta"
    assert Frame("block", module, (scale,), {}).device.type == "cpu"
    on_meta = nn.Linear(2, 2, device="meta")
    assert Frame("block", on_meta, (SimpleNamespace(x=features),), {}).device.type == "meta"
