"""The products of a small LoRA in C++ against those of autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spt_kernels import native
from tests.tolerance import assert_within_budget

# features of input and output, rank, ranges; first feature, width and step of the ranges
LAYERS = [
    (1, 1, 1, 1, 0, 1, 0),
    (48, 144, 4, 3, 0, 48, 48),
    (37, 50, 2, 2, 3, 19, 21),
    (192, 48, 8, 1, 0, 48, 0),
    (16, 40, 16, 1, 7, 30, 0),
]


def update(x: Tensor, a: Tensor, b: Tensor, layer: tuple[int, ...], scale: float) -> Tensor:
    _, n_out, rank, n_ranges, first, width, step = layer
    y = x.new_zeros(len(x), n_out)
    for n in range(n_ranges):
        low = x @ a[n * rank : (n + 1) * rank].t()
        start = first + n * step
        y[:, start : start + width] += scale * low @ b[n * width : (n + 1) * width].t()
    return y


Shape = tuple[int, int, int, int, int, int, int, int]


def gradients(
    shape: Shape, a: Tensor, b: Tensor, grad_output: Tensor, x: Tensor, how: Any, grad_x: Any
) -> tuple[Tensor, Tensor]:
    """Of both factors; that of the input, if it is given, is added to."""
    found = torch.full_like(a, float("nan")), torch.full_like(b, float("nan"))
    addresses = [tensor.data_ptr() for tensor in (a, b, grad_output, x)]
    to = [tensor.data_ptr() for tensor in found]
    native.launch_lora_gradients(
        shape, 0.7, *addresses, *how, *to, 0 if grad_x is None else grad_x.data_ptr()
    )
    return found


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("tokens", [1, 34])
@pytest.mark.parametrize("gelu", [False, True], ids=["itself", "gelu"])
def test_against_autograd(
    any_code_path: str, layer: tuple[int, int, int, int, int, int, int], tokens: int, gelu: bool
) -> None:
    n_in, n_out, rank, n_ranges, _, width, _ = layer
    random = torch.Generator().manual_seed(tokens)
    sizes = (tokens, n_in), (n_ranges * rank, n_in), (n_ranges * width, rank), (tokens, n_out)
    x, a, b, grad_output = (torch.randn(*size, generator=random) for size in sizes)

    def by_autograd(dtype: torch.dtype) -> list[Tensor]:
        leaves = [each.detach().clone().to(dtype).requires_grad_() for each in (x, a, b)]
        h = F.gelu(leaves[0]) if gelu else leaves[0]
        if gelu:
            h.retain_grad()
        y = update(h, *leaves[1:], layer, 0.7)
        y.backward(grad_output.to(dtype))
        assert h.grad is not None
        return [y.detach(), h.grad, *(leaf.grad for leaf in leaves[1:] if leaf.grad is not None)]

    h = F.gelu(x) if gelu else x
    y, grad_h = torch.zeros(tokens, n_out), torch.zeros(tokens, n_in)
    shape = tokens, *layer
    activation = native.Activation(native.GELU, 0) if gelu else native.ITSELF
    forward = [tensor.data_ptr() for tensor in (a, b, h, y)]
    native.launch_lora(shape, 0.7, *forward)
    grads = gradients(shape, a, b, grad_output, x, activation, grad_h)
    without = gradients(shape, a, b, grad_output, x, activation, None)
    assert all(torch.equal(*pair) for pair in zip(grads, without, strict=True))
    actual = [y.clone(), grad_h.clone(), *grads]
    plain, truth = by_autograd(torch.float32), by_autograd(torch.float64)
    for own, dense, exact in zip(actual, plain, truth, strict=True):
        assert_within_budget(own, dense, exact)
    native.launch_lora(shape, 0.7, *forward)
    gradients(shape, a, b, grad_output, x, activation, grad_h)
    for twice, once in zip((y, grad_h), actual[:2], strict=True):
        torch.testing.assert_close(twice, 2 * once, rtol=1e-5, atol=1e-5)
