"""Chosen entries of a LayerNorm's gradients are those of autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spt_kernels.ops import sparse_norm_grad
from spt_kernels.reference import sparse_norm_grad as reference
from tests.tolerance import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# tokens and channels, entries of the weight and of the bias
SHAPES = {
    "one": (1, 1, [0], [0]),
    "no-tokens": (0, 8, [3], [1, 2]),
    "several-splits": (1100, 70, [0, 3, 69], [1]),
    "a-block-and-one": (40, 150, list(range(0, 130, 2)), list(range(150))),
    "weight-alone": (33, 20, [7, 19], None),
    "bias-alone": (33, 20, None, [0, 19]),
    "neither": (33, 20, None, None),
}


def made(n_tokens: int, n_channels: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """A gradient, an input and its statistics."""
    generator = torch.Generator().manual_seed(n_tokens)
    gy, x = torch.randn(2, n_tokens, n_channels, generator=generator)
    x = (3 * x + 2).to(dtype)
    mean = x.float().mean(1, keepdim=True)
    rstd = ((x.float() - mean).square().mean(1, keepdim=True) + 1e-5).rsqrt()
    return tuple(tensor.to(device) for tensor in (gy.to(dtype), x, mean, rstd))


def index(positions: list[int] | None, device: str) -> Tensor | None:
    return None if positions is None else torch.tensor(positions, dtype=torch.int32, device=device)


def check_entries(
    compute: Callable[..., Tensor], shape: Any, dtype: torch.dtype, device: str
) -> None:
    """Fail unless they are those of the definition, and the same bits each time."""
    n_tokens, n_channels, *positions = shape
    tensors = made(n_tokens, n_channels, dtype, device)
    indices = [index(each, device) for each in positions]
    found = compute(*tensors, *indices)
    assert found.dtype == torch.float32
    truth = reference.sparse_norm_grad(*(t.double() for t in tensors), *indices)
    plain = reference.sparse_norm_grad(*tensors, *indices)
    assert_within_budget(found, plain, truth, roundings=4.0)
    assert torch.equal(found, compute(*tensors, *indices))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_entries_are_those_of_the_definition(device: str, shape: Any, dtype: torch.dtype) -> None:
    check_entries(sparse_norm_grad, shape, dtype, device)


def test_they_are_those_of_autograd(device: str) -> None:
    gy, x, _, _ = made(50, 24, torch.float32, device)
    weight, bias = torch.randn(2, 24).to(device)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    y = F.layer_norm(leaves[0], (24,), *leaves[1:])
    node: Any = y.grad_fn
    statistics = node._saved_result1, node._saved_result2
    _, of_weight, of_bias = torch.autograd.grad(y, leaves, gy)
    chosen = torch.tensor([2, 5, 23], dtype=torch.int32, device=device)
    found = sparse_norm_grad(gy, x, *statistics, chosen, chosen[:2])
    torch.testing.assert_close(found, torch.cat((of_weight[chosen], of_bias[chosen[:2]])))


def test_a_bias_alone_needs_no_norm(device: str) -> None:
    gy, *of_norm = made(1100, 70, torch.bfloat16, device)
    chosen = torch.tensor([0, 3, 69], dtype=torch.int32, device=device)
    found = sparse_norm_grad(gy, None, None, None, None, chosen)
    assert torch.equal(found, sparse_norm_grad(gy, *of_norm, None, chosen))


def test_tensors_need_not_be_contiguous(device: str) -> None:
    gy, x, mean, rstd = made(50, 24, torch.float32, device)
    chosen = torch.arange(0, 24, 3, dtype=torch.int32, device=device)
    expected = sparse_norm_grad(gy, x, mean, rstd, chosen, chosen)
    views = [t.t().contiguous().t() for t in (gy, x)]
    wide = chosen.repeat_interleave(2)[::2]
    assert torch.equal(sparse_norm_grad(*views, mean, rstd, wide, wide), expected)


def test_a_channel_that_there_is_none_of_shows_and_spoils_no_other(device: str) -> None:
    tensors = made(50, 24, torch.float32, device)
    chosen = torch.tensor([-1, 3, 24], dtype=torch.int32, device=device)
    found = sparse_norm_grad(*tensors, chosen, chosen)
    assert found.isnan().tolist() == [True, False, True] * 2


def test_what_is_not_a_number_stays_in_its_channel(device: str) -> None:
    gy, *others = made(50, 24, torch.float32, device)
    gy[7, 3] = float("nan")
    chosen = torch.tensor([2, 3], dtype=torch.int32, device=device)
    found = sparse_norm_grad(gy, *others, chosen, chosen)
    assert found.isnan().tolist() == [False, True] * 2


def test_opcheck(device: str) -> None:
    tensors = made(6, 8, torch.float32, device)
    chosen = torch.tensor([1, 2], dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.spt.sparse_norm_grad.default, (*tensors, chosen, None))


@pytest.mark.parametrize(
    ("replaced", "error", "message"),
    [
        ({0: torch.zeros(6, 8).double()}, TypeError, "grad_output: expected fp32, bf16 or fp16"),
        ({0: torch.zeros(48)}, ValueError, r"grad_output: expected \[tokens, channels\]"),
        ({1: torch.zeros(5, 8)}, ValueError, r"input: expected shape \(6, 8\)"),
        ({2: None}, ValueError, "mean: expected a tensor where weight_index is one, got None"),
        ({2: torch.zeros(5)}, ValueError, "mean: expected 6 values, one per row, got 5"),
        ({3: torch.zeros(6, device="meta")}, ValueError, "rstd: expected device cpu, got meta"),
        ({4: torch.zeros(2)}, TypeError, "weight_index: expected int32, got torch.float32"),
        ({5: torch.zeros(1, 2).int()}, ValueError, "bias_index: expected one dimension"),
    ],
)
def test_refusals(replaced: dict[int, Any], error: type[Exception], message: str) -> None:
    chosen = torch.tensor([1, 2], dtype=torch.int32)
    given: list[Any] = [*made(6, 8, torch.float32, "cpu"), chosen, chosen]
    for place, tensor in replaced.items():
        given[place] = tensor
    with pytest.raises(error, match=message):
        sparse_norm_grad(*given)
