"""What a quantized weight is taken for, and the refusal by name of what cannot be served."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.model import backbone_numel, describe
from spt_kernels.model.digest import digests_of
from spt_kernels.model.quantized import (
    inner_tensors,
    is_quantized,
    logical_numel,
    logical_shape,
    matrix_of,
    quantization,
    quantized_names,
)
from spt_kernels.ops.fingerprint import fingerprint
from spt_kernels.sensitivity import skewed_sensitivity
from tests.models import tiny_batch, tiny_vit
from tests.quantized import RowScaled, quantize, quantized


class Packed(nn.Parameter):
    """A parameter with attributes."""


def packed(out_features: int, in_features: int) -> nn.Parameter:
    """What a weight of bitsandbytes looks like from outside: two values to a byte, and a state."""
    n = out_features * in_features // 2
    weight: Any = Packed(torch.zeros(n, 1, dtype=torch.uint8), requires_grad=False)
    inner = SimpleNamespace(quant_type="dynamic", absmax=torch.ones(2), code=torch.arange(4))
    weight.quant_state = SimpleNamespace(
        quant_type="nf4",
        shape=torch.Size((out_features, in_features)),
        dtype=torch.bfloat16,
        absmax=torch.ones(3),
        state2=inner,
    )
    return weight  # type: ignore[no-any-return]


def test_a_subclass_that_flattens_and_is_a_float_again() -> None:
    layer = quantized(nn.Linear(6, 4))
    matrix = matrix_of(layer)
    assert matrix is not None
    assert (matrix.shape, matrix.dtype) == ((4, 6), torch.float32)
    assert quantization(layer.weight) == "RowScaled"
    assert inner_tensors(layer.weight).keys() == {"levels", "scale"}
    assert torch.equal(matrix.dense(torch.float32), layer.weight.dequantize())
    x = torch.randn(3, 6)
    assert torch.equal(matrix.product(x, layer.bias), layer(x))


def test_packed_weights_with_a_state() -> None:
    weight = packed(8, 6)
    assert is_quantized(weight)
    assert (logical_shape(weight), logical_numel(weight)) == ((8, 6), 48)
    assert quantization(weight) == "nf4"
    assert list(inner_tensors(weight)) == ["data", "absmax", "state2.absmax", "state2.code"]


def test_floats_are_not_quantized() -> None:
    for parameter in (nn.Parameter(torch.ones(2, 3)), torch.ones(2, 3), torch.ones(2).char()):
        assert not is_quantized(parameter)
        assert (logical_shape(parameter), quantization(parameter)) == (tuple(parameter.shape), "")
    assert quantized_names(tiny_vit()) == {}


class Unreadable(Tensor):
    """A weight that has a product alone, as torchao's 4 bits for a card."""

    __module__ = "torchao.made_up"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not Tensor.dequantize
        return super().__torch_function__(func, types, args, kwargs or {})


def test_values_that_only_a_product_tells() -> None:
    layer = nn.Linear(5, 4)
    values = layer.weight.detach().clone()
    layer.weight = nn.Parameter(values.as_subclass(Unreadable), requires_grad=False)
    matrix = matrix_of(layer)
    assert matrix is not None
    dense = matrix.dense(torch.float32)
    assert torch.equal(dense.as_subclass(Tensor), values)
    assert dense.is_contiguous()


def test_a_description_has_logical_shapes() -> None:
    model = quantize(tiny_vit(), but=lambda name: "qkv" in name or "head" in name)
    assert describe(model) == describe(tiny_vit())
    assert backbone_numel(model) == backbone_numel(tiny_vit())
    embedding = nn.Embedding(4, 6)
    embedding.weight = nn.Parameter(RowScaled.of(embedding.weight), requires_grad=False)
    assert describe(embedding)["weight"].kind == "other"


def test_digests_are_of_every_part() -> None:
    weight = quantized(nn.Linear(6, 4)).weight
    plain = torch.randn(3)
    first = digests_of([weight, plain])
    assert first[1] == fingerprint([plain])[0]
    assert len(first[0]) == 32
    seen = {first[0]}
    for name, change in (("levels", 1), ("scale", 0.5)):
        getattr(weight, name)[1, 0] += change
        seen.add(digests_of([weight])[0])
    assert len(seen) == 3
    assert digests_of([weight.data]) == digests_of([weight])
    other: Any = packed(8, 6)
    assert digests_of([other]) == digests_of([packed(8, 6)])
    other.quant_state.state2.absmax[1] = 2.0
    assert digests_of([other]) != digests_of([packed(8, 6)])


class Int8Params(nn.Parameter):
    """As bitsandbytes has it."""

    __module__ = "bitsandbytes.nn.modules"


class Params4bit(nn.Parameter):
    """As bitsandbytes has it before it is moved to a device."""

    __module__ = "bitsandbytes.nn.modules"


def with_weight(kind: type[nn.Parameter], dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = kind(torch.zeros(4, 4, dtype=dtype), requires_grad=False)
    return layer


def repacked() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = packed(4, 4)
    layer.weight.quant_state.packing_format_for_cpu = True  # type: ignore[union-attr]
    return layer


def rounding_its_input() -> nn.Linear:
    layer = quantized(nn.Linear(4, 4))
    layer.weight.act_quant_kwargs = {}  # type: ignore[attr-defined]
    return layer


def hooked() -> nn.Linear:
    layer = quantized(nn.Linear(4, 4))
    layer.forward = lambda x: F.linear(x, layer.weight)  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_weight(Int8Params, torch.int8), "rounds what comes in on a card as well"),
        (lambda: with_weight(Params4bit), "is not quantized yet: move the model to its device"),
        (repacked, "was repacked, and rounded again, by a forward in evaluation mode"),
        (rounding_its_input, "is a RowScaled with act_quant_kwargs, which quantizes or rescales"),
        (hooked, "has a forward of its own put on it, as hooks of accelerate are"),
    ],
    ids=["llm.int8", "not yet", "repacked", "dynamic", "hooked"],
)
def test_what_cannot_be_is_refused_by_name(make: Any, message: str) -> None:
    model = tiny_vit(depth=1)
    plan = spt.allocate(skewed_sensitivity(model), 100, None)
    model.blocks[0].mlp.fc1 = make()
    for refused in (
        lambda: spt.measure_sensitivity(model, [tiny_batch(2)], progress=False),
        lambda: spt.apply(model, plan),
        lambda: spt.dequantize(model),
    ):
        with pytest.raises(ValueError, match=rf"blocks\.0\.mlp\.fc1\.weight.*{message}"):
            refused()
    assert not hasattr(model, "spt_tuning")


def test_what_the_model_reads_itself_is_refused_by_name() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.read, self.head = nn.Linear(48, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x.flatten(1)[:, :48]).tanh()
            return self.head(F.linear(x, self.read.weight).tanh())

    torch.manual_seed(0)
    model = Reads()
    scores = spt.measure_sensitivity(model, [tiny_batch(4)], progress=False)
    assert scores.info["read.weight"].kind == "functional"
    quantize(model)
    with pytest.raises(ValueError, match=r"read\.weight is quantized, and the model reads it"):
        spt.apply(model, spt.allocate(scores, 300, None))
    assert type(model.first) is nn.Linear
