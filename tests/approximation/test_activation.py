"""Activations that keep a few bits: what they give, what they keep, and when they stay exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spt_kernels import LoraLinear, LoraSpec, SparseDeltaLinear, approximate
from spt_kernels.approximation.activation import EncodedActivation, function_of
from spt_kernels.ops.encode_derivative import TWO_BITS


def two_bit_slope(x: Tensor, function: str = "gelu") -> Tensor:
    """By the definition, element by element."""
    c, a, b = TWO_BITS[function]
    level = torch.where(x.abs() > c, b, a).double()
    return torch.where(x > 0, level, 1 - torch.where(x.abs() < c, a, b))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of all tensors that the graph of a result saves, each storage once."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("shape", [(), (0, 4), (7,), (3, 5, 6)], ids=str)
@pytest.mark.parametrize(
    ("make", "function"),
    [
        (nn.GELU, "gelu"),
        (lambda: nn.GELU(approximate="tanh"), "gelu-tanh"),
        (nn.SiLU, "silu"),
        (lambda: nn.SiLU(inplace=True), "silu"),
        (timm.layers.QuickGELU, "quick-gelu"),
        (timm.layers.GELU, "gelu"),
        (timm.layers.GELUTanh, "gelu-tanh"),
    ],
)
def test_output_is_exact_and_gradient_that_of_the_levels(
    make: Callable[[], nn.Module], function: str, shape: tuple[int, ...]
) -> None:
    module = make()
    assert function_of(module) == function
    x, grad = noise(*shape), noise(*shape, seed=1)
    plain = module(x.clone())
    approximate(module, gelu="2bit")
    leaf = x.clone().requires_grad_()
    y = module(leaf * 1.0)  # of a leaf, an activation in place would not be allowed
    assert torch.equal(y, plain)
    y.backward(grad)
    expected = grad.double() * two_bit_slope(x, function)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("run", [lambda f: f, lambda f: torch.compile(f, backend="aot_eager")])
@pytest.mark.parametrize("part", [slice(None), slice(0, 3)], ids=["whole", "view"])
def test_in_place_it_is_in_place(part: slice, run: Callable[[Any], Any]) -> None:
    module, x = nn.SiLU(inplace=True), noise(4, 6)

    def through(leaf: Tensor) -> Tensor:
        y = leaf * 1.0
        module(y[:, part])  # what it returns is not looked at
        return y

    plain = through(x.clone())
    approximate(module, gelu="2bit")
    leaf = x.clone().requires_grad_()
    y = run(through)(leaf)
    assert torch.equal(y, plain)
    y.backward(torch.ones_like(y))
    expected = torch.ones_like(x).double()
    expected[:, part] = two_bit_slope(x[:, part], "silu")
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        module(leaf)


def test_what_it_does_not_know_is_no_activation() -> None:
    class GELUOfMine(nn.Module):
        def forward(self, x: Tensor, temperature: float) -> Tensor:
            return F.gelu(x * temperature)

    for module in (GELUOfMine(), nn.ReLU(), nn.Linear(2, 2), timm.layers.GluMlp(4), nn.Hardswish()):
        assert function_of(module) is None


@pytest.mark.parametrize(("bits", "share"), [("2bit", 1 / 16), ("8bit", 1 / 4)])
def test_codes_are_all_that_is_kept(bits: str, share: float) -> None:
    module, x = approximate(nn.GELU(), gelu=bits), noise(64, 128).requires_grad_()
    assert kept_bytes(lambda: module(x)) == share * x.nbytes
    with torch.no_grad():
        assert kept_bytes(lambda: module(x)) == 0
    assert module(x.detach()).grad_fn is None


@pytest.mark.parametrize("layout", ["channels-last", "transposed", "sliced"])
def test_gradients_of_other_strides_than_the_output(layout: str) -> None:
    module, x = approximate(nn.GELU(), gelu="8bit"), noise(2, 6, 4, 5)
    view = {
        "channels-last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 3),
        "sliced": x[:, ::2],
    }[layout]
    leaf = view.detach().requires_grad_()
    weights = noise(*view.shape, seed=1)
    (found,) = torch.autograd.grad((module(leaf) * weights).sum(), leaf)
    (exact,) = torch.autograd.grad((F.gelu(leaf) * weights).sum(), leaf)
    assert float((found - exact).abs().max()) <= 0.0025 * float(weights.abs().max()) + 1e-5


def test_float64_is_exact() -> None:
    x = noise(5).double().requires_grad_()
    assert torch.autograd.gradcheck(approximate(nn.GELU(), gelu="2bit"), (x,))


def test_second_derivatives_are_refused() -> None:
    x = noise(5).requires_grad_()
    y = approximate(nn.GELU(), gelu="2bit")(x).sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="approximated by spt_kernels has first derivatives"):
        grad.square().sum().backward()


def mlp(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    net, x = approximate(mlp(), gelu="2bit"), noise(6, 8).requires_grad_()
    (expected,) = torch.autograd.grad(net(x).sum(), x)
    y = checkpoint(net, x, use_reentrant=use_reentrant)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


def test_autocast_and_accumulation() -> None:
    net, x = approximate(mlp(), gelu="8bit"), noise(6, 8).requires_grad_()
    plain = mlp()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = net(x), plain(x)
    assert torch.equal(y, expected)
    for part in (y.float().square().sum(), net(x).square().sum()):
        part.backward()
    for part in (expected.float().square().sum(), plain(x).square().sum()):
        part.backward()
    for own, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert own.grad is not None
        assert theirs.grad is not None
        assert float((own.grad - theirs.grad).norm()) < 0.01 * float(theirs.grad.norm())


def test_an_activation_is_exact_where_the_layer_behind_rebuilds_its_input_from_it() -> None:
    """A LoRA needs all of its input, a sparse delta some columns, a frozen layer nothing."""

    def nodes(last: nn.Module) -> str:
        net = mlp()
        net[2] = last
        hidden = []
        net[1].register_forward_hook(lambda module, args, y: hidden.append(y.grad_fn.name()))
        approximate(net, gelu="8bit")(noise(3, 8).requires_grad_())
        return hidden[0]

    def sparse(n_columns: int) -> nn.Module:
        return SparseDeltaLinear(nn.Linear(32, 8), torch.arange(n_columns))

    encoded = EncodedActivation.apply(noise(2).requires_grad_(), "gelu", 2, False)
    approximated = encoded.grad_fn.name()
    frozen = nn.Linear(32, 8).requires_grad_(False)
    lora = LoraLinear(nn.Linear(32, 8), LoraSpec(2, ((0, 8),), 32, 1.0, 0.0))
    assert nodes(frozen) == approximated
    assert nodes(nn.Linear(32, 8)) == approximated  # it keeps its input by itself
    assert nodes(sparse(20)) == approximated  # 20 of 32 columns and a fourth are less than all
    assert nodes(sparse(24)) == "GeluBackward0"
    assert nodes(lora) == "GeluBackward0"
    lora.requires_grad_(False)
    assert nodes(lora) == approximated


def test_a_sparse_layer_behind_keeps_its_columns_and_trains_as_if_it_were_plain() -> None:
    net = mlp()
    layer = net[2] = SparseDeltaLinear(net[2], torch.tensor([0, 3, 40]))
    x = noise(6, 8).requires_grad_()
    net(x).sum().backward()
    exact = layer.delta.grad
    layer.delta.grad = None
    approximate(net, gelu="2bit")
    y = net(x)
    assert y.grad_fn.saved_input.kind == "columns"
    y.sum().backward()
    torch.testing.assert_close(layer.delta.grad, exact)  # what reaches it is exact
