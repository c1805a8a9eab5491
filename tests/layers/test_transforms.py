"""Transforms of `torch.func` over tuned layers, against `torch.autograd` over the same layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

import spt_kernels as spt
from spt_kernels.approximation import approximate
from spt_kernels.layers import (
    AdapterConv2d,
    AdapterLinear,
    LoraConv2d,
    LoraLinear,
    SparseDeltaConv2d,
    SparseDeltaLinear,
    SparseDeltaNorm,
    attach_parameter,
    attach_whole,
    freeze_layer,
    sparse_deltas,
    write_deltas,
)
from spt_kernels.model.quantized import is_quantized
from spt_kernels.plan import AdapterSpec, LoraSpec
from tests.models import tiny_batch, tiny_resnet, tiny_swin, tiny_vit

from . import test_quantized as quantized
from .test_gradcheck import INDEX, LAYERS, after_norm, sparse

ADAPTER = AdapterSpec(2, ((2, 6),))
LORA = LoraSpec(2, ((0, 2), (4, 6)), 4, 0.5, 0.0)
Values = dict[str, Tensor]

pytestmark = [  # torch's own, of vmap over attention, and of forward mode
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated"),
]


class Scaled(nn.Module):
    """Reads a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.lin = nn.Parameter(torch.randn(4)), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x * self.scale).tanh()


def attached() -> nn.Module:
    module = Scaled()
    attach_parameter(module, "scale", INDEX[:2])
    freeze_layer(module.lin)
    return module


def convolutions() -> nn.Module:
    frozen = nn.Conv2d(6, 4, 1)
    freeze_layer(frozen)
    circular: Any = nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode="circular")
    return nn.Sequential(
        LoraConv2d(nn.Conv2d(4, 6, 1), LORA),
        AdapterConv2d(SparseDeltaConv2d(nn.Conv2d(6, 6, 1, stride=2), INDEX), ADAPTER),
        frozen,
        SparseDeltaConv2d(circular, INDEX),
        SparseDeltaNorm(nn.GroupNorm(2, 4), INDEX[:2], INDEX[:1]),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(1),
    )


EVERY: Mapping[str, Callable[[], nn.Module]] = {
    **LAYERS,
    "read by its module": attached,
    "convolutions": convolutions,
}
WIDE = {"conv": (4, 1, 2), "convolutions": (4, 4, 6)}


def net(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    module = EVERY[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    module.to(dtype)
    write_deltas(sparse_deltas(module).values())
    return module


def inputs(name: str, n: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(n, *WIDE.get(name, (5, 4)), dtype=dtype)


def trained(module: nn.Module) -> Values:
    found = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    assert found
    return found


def score(module: nn.Module, values: Values, x: Tensor) -> Tensor:
    return functional_call(module, values, (x,)).float().tanh().square().sum()


def eager_gradients(module: nn.Module, x: Tensor) -> Values:
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    y = module(x).float().tanh().square().sum()
    return dict(zip(named, torch.autograd.grad(y, [*named.values()]), strict=True))


def assert_same(found: Values, expected: Values, **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].to(value.dtype), value, **tolerance, msg=name)


def assert_gradients_of_each(module: nn.Module, x: Tensor, **tolerance: float) -> None:
    def of_one(values: Values, sample: Tensor) -> Tensor:
        return score(module, values, sample[None])

    held = {name: value.clone() for name, value in module.state_dict().items()}
    fresh = [delta.is_fresh for delta in sparse_deltas(module).values()]
    found = vmap(grad(of_one), (None, 0))(trained(module), x)
    now = {name: value for name, value in module.state_dict().items() if not is_quantized(value)}
    assert [name for name, value in now.items() if not torch.equal(value, held[name])] == []
    assert fresh == [delta.is_fresh for delta in sparse_deltas(module).values()]
    for n, sample in enumerate(x):
        expected = eager_gradients(module, sample[None])
        assert_same({name: each[n] for name, each in found.items()}, expected, **tolerance)


@pytest.mark.parametrize("name", EVERY)
def test_the_gradient_of_each_sample(name: str) -> None:
    assert_gradients_of_each(net(name), inputs(name))


@pytest.mark.parametrize(
    ("make", "structured", "size"),
    [(tiny_vit, "lora", 16), (tiny_swin, "adapter", 32), (tiny_resnet, "lora", 32)],
)
def test_the_gradient_of_each_image(make: Any, structured: Any, size: int) -> None:
    model, (images, labels) = make(), tiny_batch(3, size=size)
    sensitivity = spt.measure_sensitivity(model, [(images, labels)])
    spt.apply(model, spt.allocate(sensitivity, 900, structured=structured, rank=1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    write_deltas(sparse_deltas(model).values())
    assert_gradients_of_each(model, images, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_the_gradient_of_each_sample_over_a_quantized_weight(kind: str) -> None:
    layer, x = quantized.tuned_layer(kind), torch.randn(3, 5, quantized.IN)
    assert_gradients_of_each(layer, x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vmap(layer)(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_each_sample_in_16_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 2).to(dtype)
    for local in ("weight", "bias"):
        assert attach_whole(head, local)
    lora = LoraLinear(SparseDeltaLinear(nn.Linear(4, 6, dtype=dtype), INDEX), LORA)
    module = nn.Sequential(nn.LayerNorm(4, dtype=dtype), lora, head)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    write_deltas(sparse_deltas(module).values())
    x = torch.randn(3, 5, 4, dtype=dtype)
    assert_gradients_of_each(module, x, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["linear after a norm", "lora on a sparse linear", "adapter"])
def test_the_gradient_of_each_sample_under_autocast(name: str) -> None:
    module, x = net(name, torch.float32), inputs(name, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_gradients_of_each(module, x, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", EVERY)
def test_a_direction(name: str) -> None:
    module, x = net(name), inputs(name)
    values, step = trained(module), torch.randn_like(x)
    along = {n: torch.randn_like(value) for n, value in values.items()}
    found = jvp(lambda v, x: score(module, v, x), (values, x), (along, step))[1]
    leaf = x.clone().requires_grad_()
    score(module, {}, leaf).backward()
    assert leaf.grad is not None
    gradients = eager_gradients(module, x)
    products = [(gradients[n] * value).sum().double() for n, value in along.items()]
    expected = (leaf.grad * step).sum() + torch.stack(products).sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_a_second_derivative(name: str) -> None:
    module, x, width = net(name), inputs(name), 1e-3
    values, step = trained(module), torch.randn_like(x)

    def gradients_at(x: Tensor) -> Values:
        return grad(lambda v: score(module, v, x))(values)

    found = jvp(gradients_at, (x,), (step,))[1]
    above, below = (eager_gradients(module, x + side * width * step) for side in (1, -1))
    differences = {n: (above[n] - below[n]) / (2 * width) for n in values}
    assert_same(found, differences, rtol=1e-2, atol=5e-3)
    assert max(float(value.abs().max()) for value in found.values()) > 0.1


@pytest.mark.parametrize("name", EVERY)
def test_many_values_at_once(name: str) -> None:
    module, x = net(name), inputs(name)
    many = {n: torch.stack([v, -v, 2 * v]) for n, v in trained(module).items()}
    found = vmap(lambda values: functional_call(module, values, (x,)))(many)
    for n in range(3):
        one = {name: value[n].clone() for name, value in many.items()}
        torch.testing.assert_close(found[n], functional_call(module, one, (x,)))


def test_a_batch_of_models_is_refused_by_name() -> None:
    module, x = net("linear"), inputs("linear")
    many = {n: torch.stack([p, p]).detach() for n, p in module.named_parameters()}
    with pytest.raises(ValueError, match=r"weight is tuned and comes as a batch, but which"):
        vmap(lambda values: functional_call(module, values, (x,)))(many)
    alone = {n: v for n, v in many.items() if "delta" in n}
    assert vmap(lambda values: functional_call(module, values, (x,)))(alone).shape[0] == 2
    # one model's weights may be differentiated, and have no gradient where the delta has it
    frozen = {n: p.detach() for n, p in module.named_parameters()}
    of_weight = grad(lambda values: score(module, values, x))(frozen)["weight"].view(-1)
    assert not of_weight[INDEX].any()
    assert of_weight.count_nonzero() == of_weight.numel() - len(INDEX)


def test_dropout_is_drawn_as_vmap_is_told() -> None:
    torch.manual_seed(0)
    module = LoraLinear(nn.Linear(4, 6), LoraSpec(4, ((0, 6),), 4, 1.0, 0.5))
    nn.init.normal_(module.lora_b)
    x = torch.randn(4).expand(64, 5, 4)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(module)(x)
    same = vmap(module, randomness="same")(x)
    assert torch.equal(same, same[:1].expand_as(same))
    own = vmap(module, randomness="different")(x).flatten(0, 1)
    assert len(own.unique(dim=0)) > 8  # of 2⁴ masks
    whole = module.eval()(x[0, :1])
    torch.testing.assert_close(own.mean(0, keepdim=True), whole, rtol=0.3, atol=0.3)
    assert torch.equal(vmap(module)(x)[0], module(x)[0])


def test_forward_mode_without_a_transform() -> None:
    module, x = net("lora on a sparse linear"), inputs("lora on a sparse linear")
    tangent = torch.randn_like(x)
    expected = jvp(module, (x,), (tangent,))[1]
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, expected)


def test_a_compiled_transform() -> None:
    module, x = after_norm(sparse()), torch.randn(3, 5, 4)
    module.append(AdapterLinear(nn.Linear(2, 6), ADAPTER)).append(
        LoraLinear(nn.Linear(6, 6), LoraSpec(2, ((0, 6),), 6, 1.0, 0.0))
    )
    each = vmap(grad(lambda v, x: score(module, v, x)), (None, 0))
    compiled = torch.compile(each, backend="aot_eager", fullgraph=True)
    assert_same(compiled(trained(module), x), each(trained(module), x))


def test_of_an_approximated_model_they_are_exact() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), sparse(), nn.GELU(), nn.Linear(6, 3))
    x = torch.randn(3, 4)
    expected = jacrev(module)(x)
    assert approximate(module, gelu="2bit", layer_norm="from-output") is module
    torch.testing.assert_close(jacrev(module)(x), expected)
    direction = torch.randn_like(x)
    found = jvp(module, (x,), (direction,))[1]
    torch.testing.assert_close(found, torch.einsum("abcd,cd->ab", expected, direction))


def test_a_head_that_is_edited_before_its_first_step() -> None:
    torch.manual_seed(0)
    head, x = nn.Linear(4, 6).bfloat16(), torch.randn(3, 4, dtype=torch.bfloat16)
    assert attach_whole(head, "weight")
    head.weight.data.fill_(0.5)
    values = {"weight_fp32": torch.ones(6, 4)}
    given = vmap(lambda x: functional_call(head, values, (x,)))(x)
    torch.testing.assert_close(given, F.linear(x, values["weight_fp32"].bfloat16(), head.bias))
    torch.testing.assert_close(vmap(head)(x), F.linear(x, x.new_full((6, 4), 0.5), head.bias))
    assert torch.equal(head.weight_fp32, torch.full((6, 4), 0.5))


def test_values_that_are_given_count_in_that_call_alone() -> None:
    layer, x = sparse(), torch.randn(3, 4)
    values = torch.randn(len(INDEX))

    def loss(delta: Tensor) -> Tensor:
        return functional_call(layer, {"delta": delta}, x).square().sum()

    found = grad(loss)(values)
    assert layer.sparse_deltas()["weight"].is_fresh
    with torch.no_grad():
        layer.delta.copy_(values)
    y = layer(x)
    y.square().sum().backward()
    torch.testing.assert_close(found, layer.delta.grad)
    assert F.mse_loss(y, functional_call(layer, {"delta": values}, x)) == 0.0
