"""Every op on shapes, strides, dtypes and densities at random, against its reference in float64."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from spt_kernels.ops.add_sparse_rows import add_sparse_rows
from spt_kernels.ops.sparse_weight_grad import SparsePattern, sparse_weight_grad
from spt_kernels.ops.squared_grad import accumulate_squared_grad, accumulate_squared_vector_grad
from spt_kernels.ops.top_tau import top_tau
from spt_kernels.ops.write_delta import gather_original, write_delta
from spt_kernels.reference import top_tau as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 100, 129)


def check(count: int, seed: int) -> str:
    """Compare `count` calls of each op.

    Raises:
        AssertionError: a result is off by more than the dtype's rounding explains.
    """
    for name, compare in OPS.items():
        for n in range(count):
            torch.manual_seed(seed * 1_000_003 + n)
            try:
                compare(random.Random(f"{seed} {name} {n}"))
            except BaseException as error:
                raise AssertionError(f"{name}, call {n} of seed {seed}: {error}") from error
    return f"{count:,} calls of each of {', '.join(OPS)}"


def _noise(dice: random.Random, dtype: torch.dtype, *shape: int) -> Tensor:
    """Dense, or a view with other strides, of the same values."""
    values = torch.randn(shape).to(dtype)
    way = dice.randrange(4)
    if way == 1:
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if way == 2:
        wide = torch.full((*shape[:-1], 2 * shape[-1] + 1), float("nan"), dtype=dtype)
        wide[..., 1::2] = values
        return wide[..., 1::2]
    if way == 3 and len(shape) == 3:
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    return values


def _positions(dice: random.Random, numel: int) -> Tensor:
    share = dice.choice((0.0, 0.01, 0.1, 0.5, 1.0))
    count = round(share * numel) if share else dice.randint(0, 1)
    return torch.randperm(numel)[:count].sort().values.int()


def _near(found: Tensor, truth: Tensor, scale: Tensor, what: str, dtype: torch.dtype) -> None:
    """Within roundings of fp32 sums of products in `dtype`, whose sizes `scale` adds up."""
    rounding = 64 * torch.finfo(torch.float32).eps + (
        torch.finfo(found.dtype).eps if found.dtype != torch.float32 else 0.0
    )
    excess = (found.double() - truth).abs() - rounding * (scale + truth.abs())
    assert found.isfinite().all(), f"{what}: NaN or infinite"
    assert not (excess > 1e-30).any(), f"{what} in {dtype}: off by {float(excess.max()):.3e} more"


def _sparse_weight_grad(dice: random.Random) -> None:
    tokens, n_out, n_in = (dice.choice(SIZES) for _ in range(3))
    dtype = dice.choice(DTYPES)
    grad_output, x = _noise(dice, dtype, tokens, n_out), _noise(dice, dtype, tokens, n_in)
    index = _positions(dice, n_out * n_in)
    wanted = SparsePattern.build(index, n_out, n_in) if dice.random() < 0.5 else index
    found = sparse_weight_grad(grad_output, x, wanted)
    gy, xs = grad_output.double(), x.double()
    truth, scale = gy.T @ xs, gy.abs().T @ xs.abs()
    rows = index.long()
    _near(found, truth.flatten()[rows], scale.flatten()[rows], "sparse_weight_grad", dtype)


def _squared_grad(dice: random.Random) -> None:
    samples, tokens, n_out, n_in = (dice.choice(SIZES[:9]) for _ in range(4))
    dtype, factor = dice.choice(DTYPES), dice.choice((1.0, 3.0))
    grad_output = _noise(dice, dtype, samples, tokens, n_out)
    x = _noise(dice, dtype, samples, tokens, n_in)
    start = torch.rand(n_out, n_in)
    score = start.clone()
    accumulate_squared_grad(score, grad_output, x, factor)
    gy, xs = grad_output.double(), x.double()
    each = factor * torch.einsum("bto,bti->boi", gy, xs)
    size = factor * torch.einsum("bto,bti->boi", gy.abs(), xs.abs())
    truth = start.double() + each.square().sum(0)
    _near(score, truth, start + (size * size).sum(0), "squared_grad", dtype)


def _squared_vector_grad(dice: random.Random) -> None:
    samples, tokens, width = (dice.choice(SIZES[:9]) for _ in range(3))
    dtype = dice.choice(DTYPES)
    grad_output = _noise(dice, dtype, samples, tokens, width)
    score = torch.zeros(width)
    accumulate_squared_vector_grad(score, grad_output, None)
    gy = grad_output.double()
    truth, size = gy.sum(1).square().sum(0), gy.abs().sum(1).square().sum(0)
    _near(score, truth, size, "squared_vector_grad", dtype)


def _top_tau(dice: random.Random) -> None:
    dtype = dice.choice(DTYPES[:2])
    tensors = []
    for _ in range(dice.randint(1, 5)):
        values = torch.randn(dice.choice((0, 1, 5, 100, 3000))).square()
        if dice.random() < 0.5:
            values = (values * 4).floor() / 4  # ties, and zeros
        tensors.append(values.to(dtype))
    positive = [int((tensor > 0).sum()) for tensor in tensors]
    caps = [dice.randint(0, n) for n in positive]
    k = dice.randint(0, sum(caps))
    found = top_tau(tensors, k, caps)
    expected = (
        reference.top_tau(tensors, k, caps) if k else [t.new_zeros(0).long() for t in tensors]
    )
    for own, spec in zip(found, expected, strict=True):
        assert torch.equal(own, spec), "top_tau: other positions"


def _write_delta(dice: random.Random) -> None:
    dtype = dice.choice(DTYPES)
    weight = torch.randn(dice.choice(SIZES), dice.choice(SIZES)).to(dtype)
    before, index = weight.clone(), _positions(dice, weight.numel())
    original, delta = gather_original(weight, index), torch.randn(len(index))
    write_delta([weight], [index], [original], [delta])
    truth = before.clone()
    truth.view(-1)[index.long()] = (original.float() + delta).to(dtype)
    assert torch.equal(weight, truth), "write_delta: other values"
    write_delta([weight], [index], [original], None)
    assert torch.equal(weight, before), "write_delta: the base is another one"


def _add_sparse_rows(dice: random.Random) -> None:
    n_out, n_in = dice.choice(SIZES), dice.choice(SIZES)
    dtype, spans, end = dice.choice(DTYPES), [], 0
    for _ in range(dice.randint(1, 4)):
        begin = end + dice.randint(0, 2)
        end = begin + dice.randint(0, 9)
        spans.append((begin, end))
    x = torch.randn(end, n_in).to(dtype)
    output = torch.randn(end, n_out).to(dtype)
    indices = [_positions(dice, n_out * n_in) for _ in spans]
    befores = [torch.randn(len(index)).to(dtype) for index in indices]
    afters = [torch.randn(len(index)).to(dtype) for index in indices]
    truth, scale = output.double(), output.double().abs()
    for (begin, stop), index, one, other in zip(spans, indices, befores, afters, strict=True):
        change, size = (torch.zeros(n_out * n_in, dtype=torch.float64) for _ in range(2))
        change[index.long()] = other.double() - one.double()
        size[index.long()] = other.double().abs() + one.double().abs()
        own = x[begin:stop].double()
        truth[begin:stop] += own @ change.view(n_out, n_in).T
        scale[begin:stop] += own.abs() @ size.view(n_out, n_in).T
    add_sparse_rows(output, x, spans, indices, befores, afters)
    _near(output, truth, scale, "add_sparse_rows", dtype)


OPS: dict[str, Callable[[random.Random], None]] = {
    "sparse_weight_grad": _sparse_weight_grad,
    "squared_grad": _squared_grad,
    "squared_vector_grad": _squared_vector_grad,
    "top_tau": _top_tau,
    "write_delta": _write_delta,
    "add_sparse_rows": _add_sparse_rows,
}
