"""A backward that calls its launchers itself: where nobody listens, and with what fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from spt_kernels import AdapterSpec, LoraLinear, LoraSpec, SparseDeltaLinear
from spt_kernels.layers.adapter import AdapterLinear
from spt_kernels.layers.lora import LoraConv2d
from spt_kernels.layers.quantized import QuantizedDeltaLinear, QuantizedLoraLinear
from spt_kernels.ops.launching import as_on_card, may_launch
from tests.quantized import quantized

from .truth import tokens

INDEX = torch.arange(0, 480, 13)
INDICES = ([3, 100, 200], [7, 30, 250])  # of different columns


def layer() -> SparseDeltaLinear:
    torch.manual_seed(0)
    return SparseDeltaLinear(nn.Linear(24, 20), INDEX)


class Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_ops() -> None:
    own = layer()
    y = own(F.layer_norm(tokens(5, 24), (24,)))
    assert may_launch(y.detach())
    with Log() as log:
        y.sum().backward()
    assert {"spt::sparse_weight_grad", "spt::rebuild_layer_norm"} <= log.seen


LORA = LoraSpec(2, ((0, 20),), 24, dropout=0.5)
BASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "delta": lambda: (layer(), tokens(5, 24)),
    "lora": lambda: (LoraLinear(nn.Linear(24, 20), LORA), tokens(5, 24)),
    "strided-lora": lambda: (LoraLinear(nn.Linear(24, 20), LORA), tokens(24, 5).t()),
    "lora-of-ranges": lambda: (
        LoraLinear(nn.Linear(24, 20), LoraSpec(2, ((0, 5), (9, 20)), 24, dropout=0.5)),
        tokens(5, 24),
    ),
    "adapter": lambda: (
        AdapterLinear(nn.Linear(24, 20), AdapterSpec(2, ((0, 20),))),
        tokens(5, 24),
    ),
    "pointwise-lora": lambda: (LoraConv2d(nn.Conv2d(24, 20, 1), LORA), tokens(2, 24, 3, 3)),
    "quantized-delta": lambda: (
        QuantizedDeltaLinear(quantized(nn.Linear(24, 20)), INDEX),
        tokens(5, 24),
    ),
    "quantized-lora": lambda: (
        QuantizedLoraLinear(quantized(nn.Linear(24, 20)), LORA),
        tokens(5, 24),
    ),
}


@pytest.mark.parametrize("source", ["plain", "norm", "gelu"])
@pytest.mark.parametrize("kind", BASES)
def test_a_step_dispatches_no_op_of_ours(kind: str, source: str) -> None:
    own, x = BASES[kind]()
    make = {"plain": torch.clone, "norm": lambda x: F.layer_norm(x, x.shape[-1:]), "gelu": F.gelu}
    own(x)  # the first forward writes what was changed before it
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        own(make[source](x.clone().requires_grad_())).square().sum().backward()
    seen = {event.key for event in profile.key_averages()}
    assert "aten::sum" in seen  # it listens
    assert {name for name in seen if name.startswith("spt::")} == set()


def test_a_dispatch_mode_sees_dropout_and_sparse_rows() -> None:
    lora, delta = (
        LoraLinear(nn.Linear(24, 20), LORA),
        QuantizedDeltaLinear(quantized(nn.Linear(24, 20)), INDEX),
    )
    with Log() as log:
        for own in (lora, delta):
            own(tokens(5, 24).requires_grad_()).sum().backward()
    assert {"spt::dropout", "spt::dropout_", "spt::add_sparse_rows"} <= log.seen


def test_a_recorded_backward_computes_on_other_inputs_too() -> None:
    own = layer()

    def gradient(x: Tensor, grad_output: Tensor) -> Tensor:
        return torch.autograd.grad(own(x), own.delta, grad_output)[0]

    (one, other), (grad, other_grad) = torch.randn(2, 5, 24), torch.randn(2, 5, 20)
    recorded = make_fx(gradient)(one, grad)
    torch.testing.assert_close(recorded(other, other_grad), gradient(other, other_grad))


@pytest.mark.parametrize("after_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("which", ["input", "gradient"])
def test_views_of_the_opposite_count_with_their_signs(which: str, after_norm: bool) -> None:
    own = layer()

    def gradient(x: Tensor, grad_output: Tensor) -> Tensor:
        if after_norm:
            x = F.layer_norm(x.requires_grad_(), (24,))  # made again from the view
        return torch.autograd.grad(own(x), own.delta, grad_output)[0]

    x, grad = torch.randn(1200, 24), torch.randn(1200, 20)  # too many for torch's own product
    views = [
        torch._neg_view(t) if name == which else t for t, name in ((x, "input"), (grad, "gradient"))
    ]
    assert any(view.is_neg() for view in views)
    expected = gradient(*(view.clone() for view in views))
    torch.testing.assert_close(gradient(*views), expected)


@pytest.mark.parametrize("make", [F.gelu, lambda x: F.layer_norm(x, (24,))], ids=["gelu", "norm"])
def test_shapes_alone_suffice(make: Callable[[Tensor], Tensor]) -> None:
    own = LoraLinear(nn.Linear(24, 20), LoraSpec(2, ((0, 20),), 24, dropout=0.5)).to("meta")
    own(make(torch.randn(5, 24, device="meta").requires_grad_())).sum().backward()
    assert own.lora_a.grad is not None
    assert own.lora_a.grad.shape == (2, 24)


def test_an_input_that_was_given_other_memory_is_an_error() -> None:
    own, x = layer(), torch.randn(64, 24)
    y = own(x)
    x.data = torch.randn(3, 24)  # as who prefetches the next batch into the same tensor
    with pytest.raises(ValueError, match="input: expected the leading dimensions of grad_output"):
        y.sum().backward()


def test_positions_that_were_loaded_before_a_pending_backward_are_an_error() -> None:
    few, other = (SparseDeltaLinear(nn.Linear(24, 20), torch.tensor(index)) for index in INDICES)
    y = few(torch.randn(5, 24))
    few.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="expected the columns of when the pattern was built"):
        y.sum().backward()


def test_a_weight_that_is_an_attribute_is_read() -> None:
    own = LoraLinear(nn.Linear(24, 20), LoraSpec(2, ((0, 20),), 24))
    torch.nn.utils.parametrize.register_parametrization(own, "weight", nn.Identity())
    x = torch.randn(5, 24)
    with torch.no_grad():
        torch.testing.assert_close(own(x), F.linear(x, own.weight, own.bias))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of vmap
@pytest.mark.parametrize("rows", [((0, 20),), ((0, 10), (10, 20))], ids=["one", "two"])
def test_transforms_of_a_lora_that_is_not_trained_are_those_of_its_products(rows: Any) -> None:
    torch.manual_seed(0)
    base, x, tangent = nn.Linear(24, 20), tokens(3, 5, 24), tokens(3, 5, 24)
    own = LoraLinear(base, LoraSpec(2, rows, 24)).eval()
    nn.init.normal_(own.lora_b)
    total = own.weight.detach() + own.update()
    with torch.no_grad(), as_on_card():
        torch.testing.assert_close(torch.vmap(own)(x), F.linear(x, total, own.bias))
        found = torch.func.jvp(own, (x,), (tangent,))[1]
        torch.testing.assert_close(found, F.linear(tangent, total))
        with forward_ad.dual_level():
            dual = own(forward_ad.make_dual(x, tangent))
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, found)
