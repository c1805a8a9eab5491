"""A LayerNorm that goes as on a card, whose backward sums for trained entries alone."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spt_kernels.layers import LoraLinear, SparseDeltaLinear, SparseDeltaNorm
from spt_kernels.ops.launching import as_on_card
from spt_kernels.plan import LoraSpec

FUNCTION = "CardLayerNormBackward"
PLACES = {
    "both": (nn.LayerNorm(8), [1, 2, 7], [0, 5]),
    "timm": (LayerNorm(8), [1, 2], [0, 5]),
    "weight": (nn.LayerNorm(8), [3], None),
    "bias": (nn.LayerNorm(8), None, [0, 1, 2]),
    "no_bias": (nn.LayerNorm(8, bias=False), [0, 7], None),
    "two_dims": (nn.LayerNorm((5, 8)), [0, 13, 39], [20]),
}


def tuned(name: str = "both") -> SparseDeltaNorm:
    torch.manual_seed(0)
    plain, *positions = copy.deepcopy(PLACES[name])
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    weight, bias = (None if each is None else torch.tensor(each) for each in positions)
    norm = SparseDeltaNorm(plain, weight, bias)
    for delta in norm.sparse_deltas().values():
        nn.init.normal_(delta.delta)
    return norm


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(model: nn.Module, x: Tensor, *, as_card: bool) -> dict[str, Tensor]:
    """Of a loss that every output is in, and that output."""
    leaf = x.detach().requires_grad_(x.requires_grad)
    model.zero_grad()
    with as_on_card() if as_card else contextlib.nullcontext():
        y = model(leaf)
        y.pow(3).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **found} | ({} if leaf.grad is None else {"x": leaf.grad})


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("name", PLACES)
def test_output_and_gradients_are_those_of_the_other_way(name: str, needs_x: bool) -> None:
    norm, x = tuned(name), inputs().requires_grad_(needs_x)
    expected = gradients(norm, x, as_card=False)
    found = gradients(norm, x, as_card=True)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found["y"], expected["y"])
    with as_on_card():
        assert norm(x).grad_fn.name() == FUNCTION


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PLACES)
def test_on_a_card(name: str, dtype: torch.dtype) -> None:
    norm = tuned(name).to("cuda", dtype)
    x = inputs().detach().to("cuda", dtype).requires_grad_()
    y = norm(x)
    assert y.grad_fn.name() == FUNCTION
    (y.float() ** 3).sum().backward()
    twin = copy.deepcopy(norm).double().cpu()
    expected = gradients(twin, x.double().cpu(), as_card=False)
    rough = 1e-4 if dtype == torch.float32 else 5e-2
    for local, delta in norm.sparse_deltas().items():
        own, other = delta.delta.grad.cpu(), expected[f"{local}_delta"]
        torch.testing.assert_close(own, other, rtol=rough, atol=4 * rough)


class Behind(nn.Module):
    """A norm, and a layer that makes its input of what that keeps."""

    def __init__(self, layer: nn.Module, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.norm, self.layer, self.checkpointed = tuned(), layer, checkpointed

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        if self.checkpointed:
            return checkpoint(lambda h: self.layer(self.norm(h)), h, use_reentrant=False)
        return self.layer(self.norm(h))


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(3)
    lora = LoraLinear(nn.Linear(8, 6), LoraSpec(2, ((0, 6),), 8, dropout=0.0))
    nn.init.normal_(lora.lora_b)
    return {
        "sparse": SparseDeltaLinear(nn.Linear(8, 6), torch.arange(0, 48, 3)),
        "lora": lora,
    }


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["sparse", "lora"])
def test_what_is_behind_makes_its_input_again(
    kind: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spt_kernels.layers.lora.small_shape", lambda *_: None)  # as of large ones
    torch.manual_seed(4)
    model, x = Behind(layers()[kind], checkpointed=checkpointed), inputs()
    torch.testing.assert_close(
        gradients(model, x, as_card=True), gradients(model, x, as_card=False)
    )
    if not checkpointed:
        with as_on_card():
            y: Any = model(x)
        assert y.grad_fn.saved_input.kind == "layer_norm"
        assert y.grad_fn.saved_input.producer.name() == FUNCTION


def test_it_keeps_nothing_that_the_plain_one_would_not() -> None:
    norm, x = tuned(), inputs()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with as_on_card(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm(x)
    rows = x.numel() // 8
    assert sorted(kept) == sorted([x.numel(), rows, rows, 8, 8])


def test_its_output_may_be_edited_in_place() -> None:
    norm, x = tuned(), inputs()
    with as_on_card():
        y = norm(x)
        y += 1.0
        F.relu_(y)
        y.sum().backward()
    assert norm.weight_delta.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_without_tokens(shape: tuple[int, ...]) -> None:
    norm, x = tuned(), torch.zeros(shape, requires_grad=True)
    torch.testing.assert_close(gradients(norm, x, as_card=True), gradients(norm, x, as_card=False))


def test_deltas_may_change_before_the_backward() -> None:
    x, found = inputs(), []
    for way in (contextlib.nullcontext, as_on_card):
        norm = tuned()
        with way():
            y = norm(x)
            with torch.no_grad():
                norm.bias_delta.mul_(2.0)
            found.append(torch.autograd.grad(y.pow(3).sum(), [norm.weight_delta, norm.bias_delta]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("name", ["both", "bias"])
def test_its_gradients_can_be_differentiated(name: str, changes: bool) -> None:
    x = inputs()

    def penalties(as_card: bool) -> tuple[Tensor, ...]:
        norm = tuned(name)
        trained = [delta.delta for delta in norm.sparse_deltas().values()]
        with as_on_card() if as_card else contextlib.nullcontext():
            y = norm(x).pow(3).sum()
            if changes:  # which counts from the next forward on
                with torch.no_grad():
                    norm.bias_delta.mul_(2.0)
            first = torch.autograd.grad(y, [x, *trained], create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), [x, *trained])

    for found, expected in zip(penalties(True), penalties(False), strict=True):
        torch.testing.assert_close(found, expected)


def test_training_moves_the_weight_that_the_forward_uses() -> None:
    norm, x = tuned(), inputs()
    optimizer = torch.optim.SGD([norm.weight_delta], lr=0.5)
    with as_on_card():
        norm(x).pow(2).sum().backward()
        before = norm.weight.detach().clone()
        optimizer.step()
        y = norm(x)
    assert norm.weight.ne(before).nonzero().flatten().tolist() == [1, 2, 7]
    assert torch.equal(y, F.layer_norm(x, (8,), norm.weight, norm.bias))


def name_of(norm: nn.Module, x: Tensor) -> str:
    y = norm(x)
    return "" if y.grad_fn is None else str(y.grad_fn.name())


def test_what_it_is_for() -> None:
    norm, x = tuned(), inputs()
    plain = "NativeLayerNormBackward0"
    assert name_of(norm, x) == plain  # on a CPU
    with as_on_card():
        assert name_of(norm, x) == FUNCTION
        with torch.no_grad():
            assert name_of(norm, x) == ""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert name_of(norm, x) == FUNCTION
            assert name_of(copy.deepcopy(norm).bfloat16(), x.bfloat16()) != FUNCTION
        assert name_of(copy.deepcopy(norm).bfloat16(), x.bfloat16()) == FUNCTION
        assert name_of(copy.deepcopy(norm).double(), x.double()) == plain
        frozen = copy.deepcopy(norm)
        frozen.bias_delta.requires_grad_(False)
        assert name_of(frozen, x) == plain


def test_timms_fast_norm_is_its_own() -> None:
    norm, x = tuned("timm"), inputs()
    expected = gradients(norm, x, as_card=True)
    norm._fast_norm = True
    with as_on_card():
        assert name_of(norm, x) != FUNCTION
    torch.testing.assert_close(gradients(norm, x, as_card=True), expected)


def test_a_weight_that_is_trained_itself_is_refused_as_on_a_cpu() -> None:
    norm = tuned()
    norm.weight.requires_grad_()
    with as_on_card(), pytest.raises(RuntimeError, match="requires a gradient itself"):
        norm(inputs())
