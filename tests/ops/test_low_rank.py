"""The ops of a low-rank update: against plain products of what `dropout` leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spt_kernels.ops import low_rank_down, low_rank_grad, low_rank_up, low_rank_up_
from spt_kernels.ops.dropout import dropout, key_of
from tests.tolerance import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
QKV = (3, 8, 8, 0)  # as q, k and v lie
APART = (2, 5, 12, 3)
SEED = 2**61 + 12345


def made(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def ranges(span: tuple[int, int, int, int]) -> list[tuple[slice, slice]]:
    count, width, step, first = span
    starts = [first + n * step for n in range(count)]
    return [(slice(s, s + width), slice(n * width, (n + 1) * width)) for n, s in enumerate(starts)]


def down(x: Tensor, factor: Tensor, span: Any, scale: float) -> Tensor:
    """In the dtype of `x`."""
    parts = [x[:, features] @ factor[own].to(x.dtype) for features, own in ranges(span)]
    return torch.cat(parts, 1) * scale


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", [(1, 24, 0, 0), QKV, APART], ids=str)
@pytest.mark.parametrize("n_tokens", [0, 1, 65])
def test_down(n_tokens: int, span: Any, dtype: torch.dtype, device: str) -> None:
    x = made(n_tokens, 24, dtype=dtype, device=device)
    factor = made(span[0] * span[1], 3, device=device)
    found = low_rank_down(x, factor, span, scale=0.5)
    assert found.dtype == dtype
    assert found.is_contiguous()
    rounded = factor.to(dtype)
    truth = down(x.double(), rounded, span, 0.5)
    assert_within_budget(found, down(x, rounded, span, 0.5), truth)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", [(1, 24, 0, 0), QKV, APART], ids=str)
@pytest.mark.parametrize("n_tokens", [0, 1, 65])
def test_up_in_place(n_tokens: int, span: Any, dtype: torch.dtype, device: str) -> None:
    base = made(n_tokens, 24, dtype=dtype, device=device)
    inner = made(n_tokens, span[0] * 3, dtype=dtype, device=device)
    factor = made(span[0] * span[1], 3, device=device)
    plain, truth = base.clone(), base.double()
    for total in (plain, truth):
        parts = inner.to(total.dtype).split(3, 1)
        for part, (features, own) in zip(parts, ranges(span), strict=True):
            total[:, features] += part @ factor[own].to(dtype).to(total.dtype).t() * 0.5
    version, without = base._version, base.clone()
    assert low_rank_up_(base, inner, factor, span, scale=0.5) is base
    assert base._version > version
    assert_within_budget(base, plain, truth)
    covered = torch.zeros(24, dtype=torch.bool)
    for features, _ in ranges(span):
        covered[features] = True
    assert torch.equal(base[:, ~covered], without[:, ~covered])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", [(1, 24, 0, 0), QKV], ids=str)
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_a_bias_is_added_whatever_is_dropped(
    probability: float, span: Any, dtype: torch.dtype, device: str
) -> None:
    base, inner = (made(33, n, dtype=dtype, device=device) for n in (24, span[0] * 3))
    factor, bias = made(span[0] * span[1], 3, device=device), made(48, device=device)[::2]
    how = {"probability": probability, "seed": SEED}
    expected = low_rank_up_((base.double() + bias), inner.double(), factor.to(dtype), span, **how)
    found = low_rank_up_(base.clone(), inner, factor, span, **how, bias=bias)
    assert_within_budget(found, expected.to(dtype), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("out", DTYPES[:3], ids=str)
def test_up_into_another_dtype(out: torch.dtype, dtype: torch.dtype, device: str) -> None:
    base, inner = (made(33, n, dtype=dtype, device=device) for n in (20, 4))
    factor, before = made(20, 4, device=device), base.clone()
    found = low_rank_up(base, inner, factor, dtype=out)
    assert found.dtype == out
    assert torch.equal(base, before)
    assert found.data_ptr() != base.data_ptr()
    truth = base.double() + inner.double() @ factor.to(dtype).double().t()
    plain = (base.float() + inner.float() @ factor.to(dtype).float().t()).to(out)
    assert_within_budget(found, plain, truth)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("span", [(1, 24, 0, 0), QKV], ids=str)
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_up_with_a_bias_leaves_the_base_alone(
    probability: float, span: Any, out: torch.dtype, device: str
) -> None:
    base, inner = (made(33, n, dtype=torch.bfloat16, device=device) for n in (24, span[0] * 3))
    factor, bias = made(24, 3, device=device), made(48, device=device)[::2]
    how, before = {"probability": probability, "seed": SEED, "bias": bias}, base.clone()
    found = low_rank_up(base, inner, factor, span, **how, dtype=out)
    assert found.dtype == out
    assert torch.equal(base, before)
    expected = low_rank_up_(base.double(), inner.double(), factor.bfloat16(), span, **how)
    assert_within_budget(found, expected.to(out), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_tokens", [0, 1, 1300])
def test_grad(n_tokens: int, dtype: torch.dtype, device: str) -> None:
    x = made(n_tokens, 40, dtype=dtype, device=device)
    grad_inner = made(n_tokens, 6, dtype=dtype, device=device)
    found = low_rank_grad(x, grad_inner)
    wide = torch.promote_types(dtype, torch.float32)
    assert found.dtype == wide
    truth = grad_inner.double().t() @ x.double()
    # a card's products of 16 bits do not sum as exactly as those of fp32
    plain = grad_inner.t() @ x if device == "cuda" else grad_inner.to(wide).t() @ x.to(wide)
    assert_within_budget(found, plain.to(wide), truth)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("probability", [0.0, 1e-12, 0.3, 1.0])
@pytest.mark.parametrize("in_memory", [False, True])
def test_what_is_dropped_is_what_dropout_drops(
    in_memory: bool, probability: float, device: str
) -> None:
    x, inner, factor = (made(*shape, device=device) for shape in ((37, 20), (37, 4), (20, 4)))
    seed = torch.tensor(key_of(SEED), device=device) if in_memory else SEED
    how = {"probability": probability, "seed": seed}
    kept = dropout(x, probability, SEED)
    close = torch.testing.assert_close
    close(low_rank_down(x, factor, scale=2.0, **how), kept @ factor * 2)
    parts = made(10, 4, device=device)
    close(low_rank_down(x, parts, APART, **how), down(kept, parts, APART, 1.0))
    close(low_rank_grad(x, inner, **how), inner.t() @ kept)
    expected = x + dropout(inner @ factor.t(), probability, SEED)
    close(low_rank_up(x, inner, factor, **how), expected)
    close(low_rank_up_(x.clone(), inner, factor, **how), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "narrow"), [(d, d) for d in DTYPES[:3]] + [(DTYPES[0], d) for d in DTYPES[1:3]]
)
@pytest.mark.parametrize("activation", ["gelu", "tanh", "layer_norm", "bare layer_norm"])
def test_grad_of_an_input_that_is_made_on_the_way(
    activation: Any, dtype: torch.dtype, narrow: torch.dtype, device: str
) -> None:
    source, inner = made(70, 40, dtype=dtype, device=device), made(70, 6, device=device).to(narrow)
    norm: Any = (None,) * 4
    if activation.endswith("layer_norm"):
        affine = (made(40, device=device).to(dtype), made(40, device=device).to(dtype) + 1)
        affine = affine if activation == "layer_norm" else (None, None)
        x, mean, rstd = torch.native_layer_norm(source, (40,), *affine, 1e-5)
        activation, norm = "layer_norm", (mean, rstd, *affine)
    else:
        x = F.gelu(source, approximate="tanh" if activation == "tanh" else "none")
    how = {"probability": 0.3, "seed": SEED}
    found = low_rank_grad(source, inner, **how, activation=activation, norm=norm)
    expected = low_rank_grad(x.to(narrow), inner, **how)
    assert found.dtype == torch.float32
    # an activation may be rounded to the other of two neighbours
    close = 4 * torch.finfo(narrow).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=close)


@pytest.mark.parametrize("device", DEVICES)
def test_strides_of_all_kinds(device: str) -> None:
    x, wide = made(24, 9, device=device).t(), made(9, 12, device=device)
    factor, inner = made(4, 24, device=device).t(), wide[:, 2:6]
    expected = x.contiguous() @ factor.contiguous()
    torch.testing.assert_close(low_rank_down(x, factor), expected)
    torch.testing.assert_close(low_rank_grad(x, inner), inner.t() @ x)
    torch.testing.assert_close(low_rank_up(x, inner, factor), x + inner @ factor.t())
    columns = made(4, 9, device=device).t()
    torch.testing.assert_close(low_rank_up(x, columns, factor), x + columns @ factor.t())
    odd = made(24, 10, device=device)[:, 3:7]  # no row of it begins at a multiple of 16 bytes
    torch.testing.assert_close(low_rank_down(x, odd), x @ odd)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_registered_as_they_should_be(dtype: torch.dtype) -> None:
    x, inner = made(5, 24, dtype=dtype), made(5, 9, dtype=dtype)
    factor, key = made(24, 3), torch.tensor(key_of(SEED))
    ops, check = torch.ops.spt, torch.library.opcheck
    check(ops.low_rank_down.default, (x, factor, QKV, 0.5, 0.0, 0, None))
    check(ops.low_rank_down.default, (x, factor, (1, 24, 0, 0), 0.5, 0.3, 0, key))
    check(ops.low_rank_up_.default, (x, inner, factor, QKV, 0.5, 0.0, 0, None))
    check(ops.low_rank_up_.default, (x, inner, factor, QKV, 0.5, 0.0, 0, None, made(24)))
    one = inner[:, :3], factor, (1, 24, 0, 0)
    check(ops.low_rank_up.default, (x, *one, 0.5, 0.3, SEED, None, torch.float32))
    check(ops.low_rank_up.default, (x, *one, 0.5, 0.0, 0, None, torch.float32, made(24)))
    check(ops.low_rank_grad.default, (x, inner, 0.3, SEED, None))
    if dtype != torch.float64:
        check(ops.low_rank_grad.default, (x, inner, 0.3, SEED, None, "gelu"))
        norm = made(5), made(5), made(24, dtype=dtype), None
        check(ops.low_rank_grad.default, (x, inner, 0.0, 0, None, "layer_norm", *norm))


def test_nothing_is_left_half_done_by_what_is_refused() -> None:
    x, inner, factor = made(5, 24), made(5, 3), made(24, 3)
    before = x.clone()
    with pytest.raises(
        TypeError, match=r"input: expected fp32, bf16, fp16 or fp64, got torch\.int"
    ):
        low_rank_down(x.int(), factor)
    with pytest.raises(TypeError, match=r"factor: expected floating, got torch\.int32"):
        low_rank_down(x, factor.int())
    with pytest.raises(TypeError, match=r"inner: expected torch\.float32, got torch\.float16"):
        low_rank_up_(x, inner.half(), factor)
    with pytest.raises(
        TypeError, match=r"dtype: expected fp32, bf16, fp16 or fp64, got torch\.int"
    ):
        low_rank_up(x, inner, factor, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"span: expected one of all \d+ features"):
        low_rank_up(x, inner, factor[:4], (1, 4, 0, 0))
    with pytest.raises(ValueError, match=r"bias: expected \[\d+\], got \[2\]"):
        low_rank_up(x, inner, factor, bias=torch.zeros(2))
    with pytest.raises(ValueError, match=r"input: expected \[tokens, features\], got \[24\]"):
        low_rank_down(x[0], factor)
    with pytest.raises(ValueError, match=r"factor: expected \[24, rank\], got \[23, 3\]"):
        low_rank_down(x, factor[:23])
    with pytest.raises(ValueError, match=r"inner: expected \[5, 9\], got \[5, 3\]"):
        low_rank_up_(x, inner, factor, QKV)
    with pytest.raises(ValueError, match=r"grad_inner: expected \[5, rank\], got \[4, 3\]"):
        low_rank_grad(x, inner[:4])
    for span in [(3, 8, 8, 1), (0, 8, 8, 0), (3, 8, 7, 0), (1, 24, 0, -1)]:
        with pytest.raises(ValueError, match="span: expected ranges apart from one another within"):
            low_rank_down(x, factor, span)
    with pytest.raises(ValueError, match=r"probability must be within \[0, 1\], got 1.5"):
        low_rank_up_(x, inner, factor, probability=1.5)
    with pytest.raises(ValueError, match="seed must be within"):
        low_rank_grad(x, inner, seed=-1)
    with pytest.raises(ValueError, match=r"seed must be a number or int64 \[2\] on cpu, got torch"):
        low_rank_grad(x, inner, seed=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"bias: expected floating, got torch\.int64"):
        low_rank_up_(x, inner, factor, bias=torch.arange(24))
    with pytest.raises(ValueError, match=r"bias: expected \[24\], got \[23\]"):
        low_rank_up_(x, inner, factor, bias=made(23))
    with pytest.raises(ValueError, match="bias: expected a span of all 24 features beside it"):
        low_rank_up_(x, inner[:, :2], factor[:5, :2], (1, 5, 0, 3), bias=made(24))
    with pytest.raises(ValueError, match="activation: expected 'none', 'gelu', 'tanh' or"):
        low_rank_grad(x, inner, activation="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm: expected a rstd of a LayerNorm, got None"):
        low_rank_grad(x, inner, activation="layer_norm", norm=(made(5), None, None, None))
    with pytest.raises(ValueError, match="norm: expected none beside 'gelu', got a weight"):
        low_rank_grad(x, inner, activation="gelu", norm=(None, None, made(24), None))
    norm = made(5), made(5), made(24), made(5)
    with pytest.raises(ValueError, match="norm: expected 24 values of bias on cpu, got 5 on cpu"):
        low_rank_grad(x, inner, activation="layer_norm", norm=norm)
    with pytest.raises(ValueError, match=r"base: expected it contiguous, got strides \(1, 5\)"):
        low_rank_up_(made(24, 5).t(), inner, factor)
    assert torch.equal(x, before)
