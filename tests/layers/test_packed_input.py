"""Gradients made straight from what a GELU or a LayerNorm keeps are right, and made so."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spt_kernels import LoraSpec, native
from spt_kernels.layers import LoraLinear, SparseDeltaLinear
from spt_kernels.layers.autograd import low_rank_linear
from spt_kernels.layers.autograd.saved_input import SavedInput
from spt_kernels.ops.sparse_weight_grad import SparsePattern
from tests.tolerance import assert_within_budget

from .truth import tokens

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_unavailable())

IN, OUT = 48, 30
INDEX = torch.arange(0, IN * OUT, 23)  # of every column, and too few for blocks of the product
FEW = torch.arange(0, IN * OUT, IN * 2)  # of the first column alone
AFFINE = torch.linspace(0.5, 1.5, IN), torch.linspace(-0.3, 0.4, IN)
Make = Callable[[Tensor], Tensor]


def layer(index: Tensor = INDEX, dtype: torch.dtype = torch.float32) -> SparseDeltaLinear:
    torch.manual_seed(0)
    return SparseDeltaLinear(nn.Linear(IN, OUT).to(dtype), index)


def lora(rank: int = 3, rows: tuple[tuple[int, int], ...] = ((0, OUT),)) -> LoraLinear:
    torch.manual_seed(0)
    tuned = LoraLinear(nn.Linear(IN, OUT), LoraSpec(rank, rows, IN, 1.5, 0.0))
    nn.init.normal_(tuned.lora_b)
    return tuned


def affine(x: Tensor) -> Tensor:
    return F.layer_norm(x, (IN,), *(each.to(x.dtype) for each in AFFINE))


PACKED: dict[str, Make] = {
    "gelu": F.gelu,
    "tanh_gelu": lambda x: F.gelu(x, approximate="tanh"),
    "layer_norm": affine,
    "plain_layer_norm": lambda x: F.layer_norm(x, (IN,)),
    "layer_norm_without_bias": lambda x: F.layer_norm(x, (IN,), AFFINE[0].to(x.dtype)),
    "relu": F.relu,
    "leaf": lambda x: x,
}
MADE_FIRST: dict[str, Make] = {
    "gelu_transposed": lambda x: F.gelu(x).transpose(0, 1),
    "gelu_of_transposed": lambda x: F.gelu(x.transpose(0, 1)),
    "gelu_of_a_slice": lambda x: F.gelu(torch.cat([x, x], -1)[..., 7 : 7 + IN]),
    "norm_of_two_dimensions": lambda x: F.layer_norm(x, (5, IN)),
    "norm_of_transposed": lambda x: affine(x.transpose(0, 1)),
    "norm_with_every_second_weight": lambda x: F.layer_norm(
        x, (IN,), torch.linspace(1, 2, 2 * IN, dtype=x.dtype)[::2]
    ),
}


def gradients(tuned: nn.Module, make: Make, x: Tensor) -> list[Tensor]:
    tuned.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    tuned(make(leaf)).double().square().sum().backward()
    assert leaf.grad is not None
    return [leaf.grad, *(p.grad.clone() for p in tuned.parameters() if p.grad is not None)]


def plain(tuned: SparseDeltaLinear, make: Make, x: Tensor) -> list[Tensor]:
    dense = nn.Linear(IN, OUT, dtype=x.dtype)
    dense.load_state_dict({"weight": tuned.weight, "bias": tuned.bias})
    of_x, of_weight, _ = gradients(dense, make, x)
    return [of_x, of_weight.flatten()[tuned.index.long()]]


def never(*_: object) -> Tensor:
    raise AssertionError("the input was made")


@pytest.mark.parametrize("name", [*PACKED, *MADE_FIRST])
@pytest.mark.parametrize("index", [INDEX, FEW], ids=["all-columns", "one-column"])
def test_gradients_of_a_delta(name: str, index: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    make, tuned, x = {**PACKED, **MADE_FIRST}[name], layer(index), tokens(4, 5, IN)
    if name in PACKED and name != "leaf":  # one column of which alone is kept, and wanted densely
        monkeypatch.setattr(SavedInput, "rebuild", never)
    actual = gradients(tuned, make, x)
    expected, exact = plain(tuned, make, x), plain(tuned, make, x.double())
    for own, dense, truth in zip(actual, expected, exact, strict=True):
        assert_within_budget(own, dense, truth)


@pytest.mark.parametrize("name", [*PACKED, *MADE_FIRST])
@pytest.mark.parametrize("rows", [((0, OUT),), ((2, 9),), ((0, 5), (10, 15), (20, 25))], ids=str)
def test_gradients_of_a_small_lora(
    name: str, rows: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, tuned, x = {**PACKED, **MADE_FIRST}[name], lora(rows=rows), tokens(4, 5, IN)
    with monkeypatch.context() as patch:
        if name in PACKED:
            patch.setattr(SavedInput, "rebuild", never)
        actual = gradients(tuned, make, x)
        y = tuned(make(x))
    monkeypatch.setattr("spt_kernels.layers.lora.small_shape", lambda *_: None)
    torch.testing.assert_close(y, tuned(make(x)), rtol=1e-5, atol=1e-5)
    expected = gradients(tuned, make, x)
    for own, big in zip(actual, expected, strict=True):
        torch.testing.assert_close(own, big, rtol=1e-4, atol=1e-4)


def test_a_large_lora_takes_the_librarys_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank_linear, "launch_lora", never)
    tuned = lora(rank=8)
    gradients(tuned, F.gelu, tokens(200, IN))
    with pytest.raises(AssertionError):
        tuned(tokens(17, IN))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("make", [F.gelu, affine], ids=["gelu", "layer_norm"])
def test_16_bits(make: Make, dtype: torch.dtype) -> None:
    tuned, x = layer(dtype=dtype), tokens(4, 5, IN, dtype=dtype)
    actual, expected = gradients(tuned, make, x), plain(tuned, make, x)
    exact = plain(tuned, make, x.double())
    for own, dense, truth in zip(actual, expected, exact, strict=True):
        assert_within_budget(own, dense, truth)


@pytest.mark.parametrize("make", [F.gelu, affine, F.relu], ids=["gelu", "layer_norm", "relu"])
def test_double_precision(make: Make) -> None:
    tuned, x = layer(dtype=torch.float64), tokens(4, 5, IN, dtype=torch.float64)
    for own, dense in zip(gradients(tuned, make, x), plain(tuned, make, x), strict=True):
        torch.testing.assert_close(own.double(), dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [F.gelu, affine], ids=["gelu", "layer_norm"])
def test_autocast_rounds_as_the_forward_did(make: Make) -> None:
    tuned, x = layer(), tokens(64, IN)
    grad_output = torch.randn(64, OUT).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        h = make(x)
        y = tuned(h)
    (actual,) = torch.autograd.grad(y, tuned.delta, grad_output)
    exact = grad_output.double().t() @ h.detach().bfloat16().double()
    rounded = grad_output.float().t() @ h.detach().bfloat16().float()
    index = tuned.index.long()
    # a GELU in fp32 differs from the forward's by a rounding, which may flip one to 16 bits
    assert_within_budget(actual, rounded.flatten()[index], exact.flatten()[index], roundings=2**14)


@pytest.mark.parametrize("shape", [(IN,), (1, IN), (0, IN), (2, 0, IN), (2, 3, 2, IN)], ids=str)
@pytest.mark.parametrize("make", [F.gelu, affine, lambda x: x], ids=["gelu", "norm", "leaf"])
@pytest.mark.parametrize("kind", ["delta", "lora"])
def test_shapes(shape: tuple[int, ...], make: Make, kind: str) -> None:
    tuned = layer() if kind == "delta" else lora()
    x = tokens(*shape)
    actual = gradients(tuned, make, x)
    assert actual[0].shape == x.shape
    if x.numel():
        flat = gradients(tuned, make, x.reshape(-1, IN))
        torch.testing.assert_close(actual[1:], flat[1:], rtol=1e-5, atol=1e-5)
    else:
        assert not any(bool(grad.any()) for grad in actual)


def test_not_finite_reaches_what_reads_it() -> None:
    tuned, x = layer(), tokens(6, IN)
    with torch.no_grad():
        x[2, 23] = float("nan")
        x[3, 7] = float("inf")
    tuned(F.gelu(x)).sum().backward()
    columns = tuned.index % IN
    assert torch.equal(tuned.delta.grad.isfinite(), (columns != 23) & (columns != 7))


def test_positions_that_are_written_are_followed() -> None:
    tuned, x = layer(), tokens(7, IN)
    gradients(tuned, F.gelu, x)
    index = tuned.index.clone()
    tuned.index.copy_(index + 1)
    tuned.sparse_deltas()["weight"].write()
    (_, moved), (_, expected) = gradients(tuned, F.gelu, x), plain(tuned, F.gelu, x)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)


def test_a_plan_is_neither_copied_nor_pickled() -> None:
    tuned, x = layer(), tokens(7, IN)
    expected = gradients(tuned, F.gelu, x)
    for other in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert torch.equal(gradients(other, F.gelu, x)[1], expected[1])
    small = lora()
    expected = gradients(small, F.gelu, x)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(gradients(other, F.gelu, x)[1], expected[1])


def test_a_pattern_of_inference_mode() -> None:
    with torch.inference_mode():
        pattern = SparsePattern.build(INDEX.clone(), OUT, IN)
    assert pattern.index.is_inference()
    grad_output, x = torch.randn(5, OUT), torch.randn(5, IN)
    plan = pattern.native_plan()
    assert plan is not None
    actual = plan.run(grad_output, x, 5, (OUT, IN))
    torch.testing.assert_close(actual, (grad_output.t() @ x).flatten()[INDEX])


def test_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spt_kernels.native.available", lambda: False)
    monkeypatch.setattr("spt_kernels.layers.autograd.low_rank_linear._HAS_CPP", False)
    x = tokens(7, IN)
    without = [gradients(layer(), F.gelu, x), gradients(lora(), F.gelu, x)]
    monkeypatch.undo()
    for ours, theirs in zip([layer(), lora()], without, strict=True):
        torch.testing.assert_close(gradients(ours, F.gelu, x), theirs, rtol=1e-4, atol=1e-4)
