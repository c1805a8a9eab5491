"""What is trained beside a quantized weight, against a float layer that has it all inside."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spt_kernels.layers import (
    QuantizedAdapterLinear,
    QuantizedDeltaLinear,
    QuantizedLoraLinear,
    tune_in_place,
    untune,
)
from spt_kernels.optim import SparseAdamW
from spt_kernels.plan import AdapterSpec, LoraSpec
from tests.quantized import RowScaled, quantized
from tests.tolerance import assert_within_budget

OUT, IN = 24, 16
SCATTERED = torch.arange(3, OUT * IN, 11)
LORA = LoraSpec(rank=3, rows=((2, 8), (12, 24)), in_features=IN, scale=0.5, dropout=0.0)
ADAPTER = AdapterSpec(rank=4, rows=((0, 10), (10, 24)))
KINDS = ("delta", "one row", "empty", "lora", "delta and lora", "adapter")


def plain_layer(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return quantized(nn.Linear(IN, OUT, bias, dtype=dtype))


def tuned_layer(kind: str, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> Any:
    """A tuned layer with nothing left at zero."""
    index = {"one row": torch.arange(5 * IN, 6 * IN), "empty": SCATTERED[:0], "lora": None}
    positions = index.get(kind, SCATTERED)
    layer: Any = plain_layer(dtype, bias=bias)
    if positions is not None:
        layer = QuantizedDeltaLinear(layer, positions, torch.tensor([1, 4]) if bias else None)
    if "lora" in kind:
        layer = QuantizedLoraLinear(layer, LORA)
    if kind == "adapter":
        layer = QuantizedAdapterLinear(layer, ADAPTER)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    return layer


@dataclass
class Truth:
    """What plain autograd makes of a dense float weight, base + delta + LoRA."""

    output: Tensor
    gradients: dict[str, Tensor]


def truth(layer: Any, x: Tensor, dtype: torch.dtype) -> Truth:
    held: dict[str, Tensor] = {
        name: parameter.detach().to(dtype).requires_grad_(True)
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad
    }
    x = x.detach().to(dtype).requires_grad_(True)
    weight = layer.weight.dequantize().to(dtype).flatten()
    if "delta" in held:
        weight = weight.index_add(0, layer.index.long(), held["delta"])
    weight = weight.view(OUT, IN)
    bias = None
    if layer.bias is not None:
        # as the layer holds it: with the delta, which a sum of both is given the gradient of
        bias = layer.bias.detach().to(dtype)
        if "bias_delta" in held:
            own = held["bias_delta"]
            bias = bias.index_add(0, layer.bias_index.long(), own - own.detach())
    if "lora_a" in held:
        row = 0
        parts = [weight]
        for n, (start, stop) in enumerate(LORA.rows):
            down = held["lora_a"][n * LORA.rank : (n + 1) * LORA.rank]
            up = held["lora_b"][row : row + stop - start]
            parts.append(F.pad(LORA.scale * up @ down, (0, 0, start, OUT - stop)))
            row += stop - start
        weight = torch.stack(parts).sum(0)
    y = F.linear(x, weight, bias)
    if "down_weight" in held:
        updates = []
        for n, (start, stop) in enumerate(ADAPTER.rows):
            part = slice(n * ADAPTER.rank, (n + 1) * ADAPTER.rank)
            low = F.linear(
                y[..., start:stop], held["down_weight"][:, start:stop], held["down_bias"][part]
            )
            up = F.linear(F.gelu(low), held["up_weight"][start:stop], held["up_bias"][start:stop])
            updates.append(up)
        y = y + torch.cat(updates, -1)
    loss(y).backward()
    gradients = {name: own.grad for name, own in held.items() if own.grad is not None}
    assert x.grad is not None
    return Truth(y.detach(), {**gradients, "x": x.grad})


def loss(y: Tensor) -> Tensor:
    torch.manual_seed(3)
    return (y * torch.randn(y.shape).to(y.dtype)).sum() + y.square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients(kind: str, dtype: torch.dtype) -> None:
    layer = tuned_layer(kind, dtype)
    x = torch.randn(3, 7, IN, dtype=dtype, requires_grad=True)
    layer(x)  # so that a bias of 16 bits holds its delta in the truth as well
    plain, exact = truth(layer, x, dtype), truth(layer, x, torch.float64)
    output = layer(x)
    assert output.dtype == dtype
    loss(output).backward()
    found = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    assert x.grad is not None
    found["x"] = x.grad
    assert found.keys() == exact.gradients.keys()
    factor = 4.0 if dtype == torch.bfloat16 else 2.0  # the sum of two products is rounded twice
    assert_within_budget(output, plain.output, exact.output, factor=factor)
    for name, gradient in exact.gradients.items():
        assert_within_budget(found[name].to(dtype), plain.gradients[name], gradient, factor=factor)


@pytest.mark.parametrize("kind", ["delta", "delta and lora"])
def test_gradient_of_the_input_in_double_precision(kind: str) -> None:
    layer = tuned_layer(kind).double()
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x).tanh(), x)


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_it_is_the_same(kind: str) -> None:
    layer = tuned_layer(kind, bias=False)
    x = torch.randn(5, IN)
    with torch.no_grad():
        without = layer(x)
    assert torch.equal(without, layer(x).detach())


@pytest.mark.parametrize("shape", [(IN,), (1, IN), (0, IN), (2, 0, IN)], ids=str)
def test_shapes_of_the_input(shape: tuple[int, ...]) -> None:
    layer = tuned_layer("delta and lora")
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], OUT)
    y.sum().backward()
    assert x.grad is not None
    assert layer.delta.grad is not None
    torch.testing.assert_close(y.detach(), truth(layer, x, torch.float32).output)


def test_nothing_of_the_size_of_the_weight_is_kept() -> None:
    """As the plain layer keeps a float copy of it, which is what quantizing it was to save."""

    def kept(layer: nn.Module) -> int:
        sizes = [0]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            layer(torch.randn(1, IN, requires_grad=True))
        return max(sizes)

    assert kept(plain_layer()) == OUT * IN
    for kind in KINDS[:-1]:
        assert kept(tuned_layer(kind)) < OUT * IN / 2


def test_the_weight_is_never_written() -> None:
    layer = tuned_layer("delta")
    before = layer.weight.levels.clone(), layer.weight.scale.clone()
    optimizer = SparseAdamW(layer.parameters(), lr=0.1)
    layer(torch.randn(3, IN)).sum().backward()
    optimizer.step()
    for delta in layer.sparse_deltas().values():
        delta.write()
        delta.restore()
    assert torch.equal(layer.weight.levels, before[0])
    assert torch.equal(layer.weight.scale, before[1])
    assert layer.original.numel() == 0


@pytest.mark.parametrize("make", [SparseAdamW, torch.optim.AdamW])
def test_optimizers_train_it_as_they_train_a_float_layer(make: Any) -> None:
    layer = tuned_layer("delta and lora")
    held = {n: p.detach().clone() for n, p in layer.named_parameters() if p.requires_grad}
    reference = {n: nn.Parameter(p) for n, p in held.items()}
    base, index = layer.weight.dequantize(), layer.index.long()
    layer(torch.zeros(1, IN))  # which writes the delta of the bias
    bias = layer.bias.detach().index_add(0, layer.bias_index.long(), -held["bias_delta"])

    def of_reference(x: Tensor) -> Tensor:
        weight = base.flatten().index_add(0, index, reference["delta"]).view(OUT, IN)
        own = bias.index_add(0, layer.bias_index.long(), reference["bias_delta"])
        y = F.linear(x, weight, own)
        a, b = reference["lora_a"].view(2, 3, IN), reference["lora_b"]
        low = [LORA.scale * x @ down.t() for down in a]
        first, second = low[0] @ b[:6].t(), low[1] @ b[6:].t()
        return y + F.pad(first, (2, OUT - 8)) + F.pad(second, (12, 0))

    optimizers = make(layer.parameters(), lr=0.01), torch.optim.AdamW(reference.values(), lr=0.01)
    for _ in range(5):
        x = torch.randn(6, IN)
        for optimizer, forward in zip(optimizers, (layer, of_reference), strict=True):
            for half in x.split(3):  # gradients of two parts add up
                forward(half).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, own in reference.items():
        torch.testing.assert_close(dict(layer.named_parameters())[name], own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    layer = tuned_layer("delta and lora")
    net = nn.Sequential(nn.LayerNorm(IN), layer, nn.GELU())
    x = torch.randn(4, IN, requires_grad=True)
    grads = []
    for run in (net, lambda x: checkpoint(net, x, use_reentrant=reentrant)):
        net.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        assert x.grad is not None
        grads.append([x.grad, layer.delta.grad, layer.lora_a.grad, layer.bias_delta.grad])
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


def test_dropout_of_a_lora() -> None:
    layer: Any = QuantizedLoraLinear(
        plain_layer(), LoraSpec(2, ((0, OUT),), IN, scale=1.0, dropout=0.5)
    )
    nn.init.normal_(layer.lora_b)
    x = torch.randn(8, IN, requires_grad=True)
    layer.train()
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))
    assert not torch.equal(first, layer(x))
    assert not torch.equal(first, layer.eval()(x))
    first.sum().backward()
    assert layer.lora_a.grad is not None


def test_under_autocast() -> None:
    layer = tuned_layer("delta and lora")
    x = torch.randn(4, IN, requires_grad=True)
    layer(x)
    exact = truth(layer, x, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, again = layer(x), layer(x.detach().bfloat16())  # whose bias is still to be cast
    assert y.dtype == again.dtype == torch.bfloat16
    assert torch.equal(y, again)
    loss(y.float()).backward()
    for own, expected in ((y, exact.output), (layer.delta.grad, exact.gradients["delta"])):
        assert (own.float() - expected).norm() < 0.02 * expected.norm()
    assert layer.delta.grad.dtype == layer.lora_a.grad.dtype == torch.float32


def test_compiled_in_one_graph() -> None:
    layer = tuned_layer("adapter")  # over a delta, and its backward makes the weight's product anew
    x = torch.randn(4, IN, requires_grad=True)
    y = layer(x)
    loss(y).backward()
    eager = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    again = compiled(x)
    torch.testing.assert_close(again, y)
    loss(again).backward()
    for name, parameter in layer.named_parameters():
        if name in eager:
            torch.testing.assert_close(parameter.grad, eager[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["delta", "empty", "lora"])
def test_copies_and_pickles(kind: str) -> None:
    layer = tuned_layer(kind)
    x = torch.randn(2, IN)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert torch.equal(twin(x), layer(x))
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
        assert not torch.equal(twin(x), layer(x)) or kind == "empty"


def test_state_dicts() -> None:
    layer = tuned_layer("delta")
    state = layer.state_dict()
    assert set(state) == {
        *("weight", "bias", "delta", "index", "bias_delta", "bias_index", "bias_original")
    }
    other: Any = QuantizedDeltaLinear(plain_layer(), SCATTERED, torch.tensor([1, 4]))
    other.load_state_dict(state)
    x = torch.randn(2, IN)
    assert torch.equal(other(x), layer(x))
    state["index"] = state["index"] + OUT * IN
    with pytest.raises(RuntimeError, match=r"index must lie in \[0, 384\)"):
        other.load_state_dict(state)


def test_moved_and_cast_it_keeps_its_delta_in_fp32() -> None:
    layer = tuned_layer("delta").bfloat16()
    assert layer.delta.dtype == torch.float32
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert isinstance(layer.weight, RowScaled)
    assert layer(torch.randn(2, IN, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.to("meta").weight.levels.is_meta


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["delta", "empty", "lora", "adapter"])
def test_a_quantized_weight_that_is_made_trainable_is_refused(kind: str, compiled: bool) -> None:
    layer = tuned_layer(kind)
    run = torch.compile(layer, backend="aot_eager") if compiled else layer
    layer.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"weight is quantized and requires a gradient"):
        run(torch.randn(3, IN))
    with torch.no_grad():
        run(torch.randn(3, IN))
    layer.weight.requires_grad_(False)
    run(torch.randn(3, IN)).sum().backward()


def test_untuned_it_is_the_plain_layer() -> None:
    layer: Any = plain_layer()
    x = torch.randn(3, IN)
    before = layer(x)
    weight = layer.weight
    tune_in_place(layer, QuantizedDeltaLinear, lambda own: own._hold(SCATTERED, None))
    nn.init.ones_(layer.delta)
    assert not torch.equal(layer(x), before)
    untune(layer)
    assert type(layer) is nn.Linear
    assert layer.weight is weight
    assert torch.equal(layer(x), before)


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"an nn.Linear with a quantized weight, got Linear"):
        QuantizedDeltaLinear(nn.Linear(4, 4), torch.tensor([0]))
    with pytest.raises(TypeError, match=r"an nn.Linear with a quantized weight, got Linear"):
        QuantizedLoraLinear(nn.Linear(IN, OUT), LORA)
    with pytest.raises(ValueError, match=r"index must lie in \[0, 384\), got 0 to 384"):
        QuantizedDeltaLinear(plain_layer(), torch.tensor([0, OUT * IN]))
    with pytest.raises(ValueError, match="bias_index was given, but the Linear has no bias"):
        QuantizedDeltaLinear(plain_layer(bias=False), SCATTERED, torch.tensor([1]))
