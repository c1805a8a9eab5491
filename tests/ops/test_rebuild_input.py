"""`ops.rebuild_input` gives back what LayerNorm and GELU returned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spt_kernels.ops.rebuild_input import layer_norm_of_the_op, rebuild_gelu, rebuild_layer_norm

from ..tolerance import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

LAYER_NORM_SHAPES = {
    "one-element": ((1,), 1),
    "2x3x8": ((2, 3, 8), 1),
    "block-plus-one-17x129": ((17, 129), 1),
    "two-normalized-3x4x5": ((3, 4, 5), 2),
    "all-normalized-6x7": ((6, 7), 2),
    "no-rows-0x8": ((0, 8), 1),
}
GELU_SHAPES = {"scalar": (), "empty": (0, 4), "3x5": (3, 5), "block-plus-one": (2049,)}


def ids(values: dict[str, object]) -> list[object]:
    return [pytest.param(value, id=name) for name, value in values.items()]


def noise(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def layer_norm_case(
    shape: tuple[int, ...], normalized_ndim: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Input, saved mean and rstd, weight, bias and output of ATen's LayerNorm with fp32 weights."""
    normalized = shape[len(shape) - normalized_ndim :]
    x = (3 * noise(*shape, seed=0, dtype=dtype, device=device) + 2).requires_grad_()
    weight = noise(*normalized, seed=1, dtype=torch.float32, device=device)
    bias = noise(*normalized, seed=2, dtype=torch.float32, device=device)
    if device != "cpu":  # CUDA has no mixed LayerNorm
        weight, bias = weight.to(dtype), bias.to(dtype)
    y = F.layer_norm(x, normalized, weight, bias)
    node = y.grad_fn
    return x.detach(), node._saved_result1, node._saved_result2, weight, bias, y.detach()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ids(LAYER_NORM_SHAPES))
def test_layer_norm_is_what_the_forward_gave(
    case: tuple[tuple[int, ...], int], dtype: torch.dtype, device: str
) -> None:
    shape, normalized_ndim = case
    x, mean, rstd, weight, bias, y = layer_norm_case(shape, normalized_ndim, dtype, device)

    rebuilt = rebuild_layer_norm(x, mean, rstd, weight, bias, normalized_ndim, dtype)

    truth = F.layer_norm(x.double(), weight.shape, weight.double(), bias.double())
    assert rebuilt.dtype == dtype
    assert_within_budget(rebuilt, y, truth)


@pytest.mark.parametrize("device", DEVICES)
def test_layer_norm_in_one_narrow_dtype_is_off_by_a_rounding_at_most(device: str) -> None:
    x = noise(40, 64, seed=0, dtype=torch.bfloat16, device=device).requires_grad_()
    y = F.layer_norm(x, (64,))
    assert y.grad_fn is not None
    mean, rstd = y.grad_fn._saved_result1, y.grad_fn._saved_result2

    rebuilt = rebuild_layer_norm(x.detach(), mean, rstd, None, None, 1, torch.bfloat16)

    assert_within_budget(rebuilt, y.detach(), F.layer_norm(x.detach().double(), (64,)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("has_weight", "has_bias"), [(True, False), (False, True), (False, False)])
def test_layer_norm_without_weight_or_bias(has_weight: bool, has_bias: bool, device: str) -> None:
    x, mean, rstd, weight, bias, _ = layer_norm_case((4, 24), 1, torch.float32, device)
    some_weight, some_bias = weight if has_weight else None, bias if has_bias else None

    rebuilt = rebuild_layer_norm(x, mean, rstd, some_weight, some_bias, 1, torch.float32)

    torch.testing.assert_close(rebuilt, F.layer_norm(x, (24,), some_weight, some_bias))


@pytest.mark.parametrize("device", DEVICES)
def test_layer_norm_of_a_view_and_cast_for_autocast(device: str) -> None:
    wide = noise(6, 5, 40, seed=0, dtype=torch.float32, device=device)
    for x in (wide[:, 1:4, 8:32], wide.permute(2, 0, 1)):
        leaf = x.detach().requires_grad_()
        y = F.layer_norm(leaf, x.shape[-1:])
        assert y.grad_fn is not None
        mean, rstd = y.grad_fn._saved_result1, y.grad_fn._saved_result2
        rebuilt = rebuild_layer_norm(x, mean, rstd, None, None, 1, torch.bfloat16)
        assert rebuilt.is_contiguous()
        torch.testing.assert_close(rebuilt, y.detach().bfloat16())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ids(GELU_SHAPES))
def test_gelu_is_what_the_forward_gave(
    shape: tuple[int, ...], dtype: torch.dtype, approximate: str, device: str
) -> None:
    x = 3 * noise(*shape, seed=0, dtype=dtype, device=device)

    rebuilt = rebuild_gelu(x, approximate, dtype)

    plain = F.gelu(x, approximate=approximate)
    assert_within_budget(rebuilt, plain, F.gelu(x.double(), approximate=approximate))
    if device == "cpu":
        assert torch.equal(rebuilt, plain)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["transposed", "channels-last", "sliced", "expanded"])
def test_gelu_of_any_strides_and_cast_for_autocast(layout: str, device: str) -> None:
    x = noise(4, 6, 5, 3, seed=0, dtype=torch.float32, device=device)
    view = {
        "transposed": x.transpose(0, 2),
        "channels-last": x.contiguous(memory_format=torch.channels_last),
        "sliced": x[:, 1:5, ::2],
        "expanded": x[:, :1].expand(4, 6, 5, 3),
    }[layout]

    rebuilt = rebuild_gelu(view, "none", torch.bfloat16)

    torch.testing.assert_close(rebuilt, F.gelu(view).bfloat16())


def test_gelu_far_from_zero() -> None:
    x = torch.tensor([-1e30, -40.0, -0.0, 40.0, 1e30])
    for approximate in ("none", "tanh"):
        expected = torch.tensor([0.0, 0.0, 0.0, 40.0, 1e30])
        assert torch.equal(rebuild_gelu(x, approximate, torch.float32), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    x, mean, rstd, weight, bias, _ = layer_norm_case((3, 4, 16), 1, torch.float32, device)
    weights = [weight, bias, None]
    for some in weights:
        torch.library.opcheck(
            torch.ops.spt.rebuild_layer_norm.default,
            (x.transpose(0, 1), mean, rstd, some, some, 1, torch.bfloat16),
        )
    for view in (x, x.transpose(0, 2), x[:, ::2], x[:0]):
        torch.library.opcheck(torch.ops.spt.rebuild_gelu.default, (view, "tanh", torch.float16))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(2, 3, 8).double()}, TypeError, "input: expected fp32"),
        ({"dtype": torch.int32}, TypeError, "dtype: expected fp32"),
        ({"normalized_ndim": 4}, ValueError, "normalized_ndim: expected 1 to 3"),
        ({"normalized_ndim": 0}, ValueError, "normalized_ndim: expected 1 to 3"),
        ({"mean": torch.zeros(5)}, ValueError, "mean: expected 6 values"),
        ({"rstd": torch.zeros(6, 2)}, ValueError, "rstd: expected 6 values"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight: expected shape \(8,\)"),
        ({"bias": torch.zeros(1, 8)}, ValueError, r"bias: expected shape \(8,\)"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias: expected device cpu"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, str) else "",
)
def test_layer_norm_refuses(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    good = {
        "input": torch.zeros(2, 3, 8),
        "mean": torch.zeros(6),
        "rstd": torch.zeros(2, 3, 1),
        "weight": torch.zeros(8),
        "bias": torch.zeros(8),
        "normalized_ndim": 1,
        "dtype": torch.float32,
    }
    with pytest.raises(error, match=message):
        rebuild_layer_norm(**(good | change))  # type: ignore[arg-type]


def test_gelu_refuses() -> None:
    with pytest.raises(ValueError, match="approximate: expected 'none' or 'tanh', got 'relu'"):
        rebuild_gelu(torch.zeros(2), "relu", torch.float32)
    with pytest.raises(TypeError, match=r"input: expected fp32, bf16 or fp16, got torch\.int64"):
        rebuild_gelu(torch.zeros(2, dtype=torch.int64), "none", torch.float32)


@pytest.mark.parametrize("name", ["mean", "rstd", "weight", "bias"])
def test_what_does_not_fit_never_reaches_a_kernel(name: str) -> None:
    given = {"mean": torch.empty(4), "rstd": torch.empty(4)}
    given |= {"weight": torch.empty(8), "bias": torch.empty(8)}
    given[name] = given[name][:3]
    for device, call in (("cpu", torch.ops.spt.rebuild_layer_norm), ("meta", layer_norm_of_the_op)):
        there = [tensor.to(device) for tensor in given.values()]
        with pytest.raises(ValueError, match=f"{name}: expected .*3"):
            call(torch.empty(4, 8, device=device), *there, 1, torch.float32)
