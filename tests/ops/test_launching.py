"""What is on where an op is called, as autograd and autocast, changes nothing of what it gives."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spt_kernels import ops

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
