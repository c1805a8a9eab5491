"""What is on where an op is called, as autograd and autocast, changes nothing of what it gives."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spt_kernels import native, ops

sparse_weight_grad = importlib.import_module("spt_kernels.ops.sparse_weight_grad")


@pytest.fixture(autouse=True)
def many_entries_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_weight_grad, "_dense_is_cheaper", lambda nnz, *_: nnz > 100)


def positions(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, dtype=torch.int32, device=like.device)


def squared_grad(gy: Tensor, x: Tensor) -> Tensor:
    score = torch.zeros(gy.shape[1], x.shape[1], device=x.device)
    for _ in range(2):
        ops.accumulate_squared_grad(score, gy[None], x[None])
    return score


def squared_vector_grad(gy: Tensor, x: Tensor) -> Tensor:
    score = torch.zeros(x.shape[1], device=x.device)
    for _ in range(2):
        ops.accumulate_squared_vector_grad(score, gy[None, :, : x.shape[1]], x[None])
    return score


def rows_added(gy: Tensor, x: Tensor) -> Tensor:
    output, index = torch.zeros_like(gy), positions(60, x)
    values = torch.linspace(0, 1, 60, device=x.device)
    ops.add_sparse_rows(output, x.detach(), [(0, len(x))], [index], [values * 0], [values])
    return output


def derivative(gy: Tensor, x: Tensor) -> Tensor:
    codes = ops.encode_derivative(x, "gelu", 8)[1]
    return ops.decode_derivative(gy[:, : x.shape[1]].contiguous(), codes, "gelu", 8)


def layer_norm(gy: Tensor, x: Tensor) -> Tensor:
    ones = torch.ones(len(x), device=x.device)
    return ops.rebuild_layer_norm(x, ones, ones, None, None, 1, torch.bfloat16)


# of the output's gradient `[tokens, 20]` and an input `[tokens, 10]`
CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared-grad": squared_grad,
    "squared-vector-grad": squared_vector_grad,
    "sparse-weight-grad": lambda gy, x: ops.sparse_weight_grad(gy, x, positions(60, x)),
    "dense-weight-grad": lambda gy, x: ops.sparse_weight_grad(gy, x, positions(199, x)),
    "add-sparse-rows": rows_added,
    "encode": lambda gy, x: ops.encode_derivative(x, "quick-gelu", 2)[0],
    "decode": derivative,
    "layer-norm": layer_norm,
    "gelu": lambda gy, x: ops.rebuild_gelu(x, "none", torch.bfloat16),
    "low-rank-down": lambda gy, x: ops.low_rank_down(x, x[:10, :2]),
    "low-rank-up": lambda gy, x: ops.low_rank_up(x, x[:, :2].contiguous(), x[:10, :2]),
    "low-rank-grad": lambda gy, x: ops.low_rank_grad(x, gy[:, :2].contiguous()),
    "dropout": lambda gy, x: ops.dropout(x, 0.5, 1),
}


def operands(device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gy, x = (torch.randn(30, width, generator=generator).to(device) for width in (20, 10))
    return gy, x


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_operands_may_need_a_gradient(call: Callable[..., Tensor], device: str) -> None:
    gy, x = operands(device)
    expected = call(gy, x)
    found = call(gy.requires_grad_(), x.requires_grad_())
    assert torch.equal(found, expected)
    assert not expected.requires_grad


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_under_autocast(call: Callable[..., Tensor], device: str) -> None:
    expected = call(*operands(device))
    with torch.autocast(device, torch.bfloat16):
        found = call(*operands(device))
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_in_inference_mode(call: Callable[..., Tensor], device: str) -> None:
    expected = call(*operands(device))
    with torch.inference_mode():
        found = call(*operands(device))
    assert found.is_inference()  # a tensor without a version, into which some of these write
    assert torch.equal(found, expected)


def write(weight: Tensor) -> None:
    index, values = positions(3, weight), torch.ones(3, device=weight.device)
    ops.write_delta([weight], [index], [values], [values])


def step(param: Tensor) -> None:
    count = torch.ones((), device=param.device)
    entry = ops.AdamWEntry(param, param + 1, param * 0, param * 0, count, 0.1, 0.9, 0.9, 1e-8, 0.0)
    ops.sparse_adamw([entry])


def add_rows(output: Tensor) -> None:
    index, values = positions(3, output), torch.ones(3, device=output.device)
    ops.add_sparse_rows(output, output + 1, [(0, 2)], [index], [values], [values * 2])


WRITES: dict[str, Callable[[Tensor], object]] = {
    "squared-grad": lambda x: ops.accumulate_squared_grad(x, x[None] + 1, x[None] + 1),
    "squared-vector-grad": lambda x: ops.accumulate_squared_vector_grad(x[0], x[None] + 1, None),
    "dropout": lambda x: ops.dropout_(x, 0.5, 1),
    "low-rank-up": lambda x: ops.low_rank_up_(x, x[:, :2] + 1, x[:, :2] + 1),
    "add-sparse-rows": add_rows,
    "sparse-adamw": step,
    "write-delta": write,
}


_IN_CPP = [WRITES[name] for name in ("squared-grad", "dropout", "add-sparse-rows", "write-delta")]


@pytest.mark.parametrize("call", WRITES.values(), ids=WRITES)
def test_what_is_written_into_has_another_version(
    call: Callable[[Tensor], object], device: str
) -> None:
    x = torch.full((5, 5), 2.0, device=device)
    before = x._version
    call(x)
    assert x._version > before
    with torch.inference_mode():
        same = torch.full((5, 5), 2.0, device=device)
        call(same)
        apart = torch.full((5, 5), 2.0, device=device)
    assert torch.equal(x, same)
    if native.available() and call in _IN_CPP:  # of torch's own calls none may write into it
        call(apart)
        assert torch.equal(x, apart)


def test_what_autograd_follows_is_not_written_into(device: str) -> None:
    gy, x = operands(device)
    gy, x = gy.requires_grad_() * 1, x.requires_grad_() * 1
    index, values = positions(3, x), torch.ones(3, device=device)
    calls = {
        "input": lambda: ops.dropout_(x, 0.5, 1),
        "base": lambda: ops.low_rank_up_(x, gy[:, :2].contiguous(), gy[:10, :2]),
        "output": lambda: ops.add_sparse_rows(gy, x, [(0, 9)], [index], [values], [values * 2]),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name} must need no gradient"):
            call()
        with torch.no_grad():
            call()
