"""One optimizer step for a few values of ViT-B/16, written into its weights, beside fused AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spt_kernels as spt

from .contest import hold

VIT_B = [(768, 768)] * 48 + [(3072, 768)] * 12 + [(768, 3072)] * 12
_LINE = 64  # bytes that memory hands over at once


def positions(numel: int, nnz: int, generator: torch.Generator) -> Tensor:
    """About `nnz` positions all over a tensor: the worst case, for no two share a cache line."""
    return torch.randint(numel, (nnz,), generator=generator).unique()


def sparse_layers(
    shapes: list[tuple[int, int]], values: int, dtype: torch.dtype, device: torch.device
) -> list[spt.SparseDeltaLinear]:
    """Layers of these shapes with `values` trained values in all, and gradients."""
    generator = torch.Generator().manual_seed(0)
    share = values / sum(rows * columns for rows, columns in shapes)
    layers = []
    for rows, columns in shapes:
        linear = nn.Linear(columns, rows, bias=False, dtype=dtype)
        index = positions(rows * columns, round(share * rows * columns), generator)
        layer = spt.SparseDeltaLinear(linear, index).to(device)
        layer.write_stale_deltas()  # as a forward does
        layer.delta.grad = torch.randn(len(index), generator=generator).to(device)
        layers.append(layer)
    return layers


def least_bytes(layers: list[spt.SparseDeltaLinear]) -> int:
    """Delta and both states read and written, gradient, index and originals read, and every cache
    line of a weight that has a trained value fetched and given back."""
    total = 0
    for layer in layers:
        lines = (layer.index.long() * layer.weight.itemsize // _LINE).unique_consecutive().numel()
        total += layer.delta.numel() * (3 * 8 + 4 + 4 + layer.weight.itemsize) + lines * 2 * _LINE
    return total


def bytes_a_value(optimizer: torch.optim.Optimizer, layers: list[spt.SparseDeltaLinear]) -> float:
    """State and index, in memory."""
    state = sum(part.nbytes for parts in optimizer.state.values() for part in parts.values())
    index = sum(layer.index.nbytes for layer in layers)
    return (state + index) / sum(layer.delta.numel() for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_sparse_adamw_04m(benchmark: Any, device: torch.device, dtype: torch.dtype) -> None:
    layers = sparse_layers(VIT_B, 400_000, dtype, device)
    sparse = spt.SparseAdamW([layer.delta for layer in layers], lr=1e-3)
    sparse.step()

    weights = [layer.weight.detach().clone().requires_grad_() for layer in layers]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    dense = torch.optim.AdamW(weights, lr=1e-3, fused=True)

    # what a careful user would write: fused AdamW on the values alone, then an indexed copy
    values = [nn.Parameter(torch.zeros_like(layer.delta)) for layer in layers]
    for value, layer in zip(values, layers, strict=True):
        value.grad = layer.delta.grad
    wide = [layer.index.long() for layer in layers]
    bases = [layer.original.float() for layer in layers]
    copies = [layer.weight.detach().clone() for layer in layers]
    flat = torch.optim.AdamW(values, lr=1e-3, fused=True)

    def step_and_copy() -> None:
        flat.step()
        for copy, index, base, value in zip(copies, wide, bases, values, strict=True):
            copy.view(-1).index_copy_(0, index, (base + value.detach()).to(copy.dtype))

    trained = sum(layer.delta.numel() for layer in layers)
    name = str(dtype).removeprefix("torch.")
    hold(
        benchmark,
        f"AdamW: {trained} values of 85M {name} weights, {len(VIT_B)} matrices",
        {
            "spt.SparseAdamW, weights written": sparse.step,
            "torch AdamW(fused), dense": dense.step,
            "torch AdamW(fused) on the values, index_copy_": step_and_copy,
        },
        rounds=15,
        bytes_moved=least_bytes(layers),
        targets={"torch AdamW(fused), dense": 1 / 30} if dtype == torch.float32 else None,
        facts={"state and index, bytes a value": bytes_a_value(sparse, layers)},
    )


@pytest.mark.parametrize("values", [100_000, 400_000, 1_600_000])
def test_growth_with_values(benchmark: Any, device: torch.device, values: int) -> None:
    hold_alone(benchmark, device, VIT_B, values, ("trained values", values))


@pytest.mark.parametrize("matrices", [12, 72, 288])
def test_growth_with_matrices(benchmark: Any, device: torch.device, matrices: int) -> None:
    shapes = [(768, 768)] * matrices
    hold_alone(benchmark, device, shapes, 400_000, ("matrices, 0.4M values in all", matrices))


@pytest.mark.parametrize("width", [384, 768, 1536])
def test_growth_with_width(benchmark: Any, device: torch.device, width: int) -> None:
    shapes = [(width, width)] * 72
    hold_alone(benchmark, device, shapes, 400_000, ("width, 0.4M values in 72 matrices", width))


def hold_alone(
    benchmark: Any,
    device: torch.device,
    shapes: list[tuple[int, int]],
    values: int,
    growth: tuple[str, float],
) -> None:
    """One point of a drawing: ours, after something that leaves none of it in a cache."""
    layers = sparse_layers(shapes, values, torch.float32, device)
    optimizer = spt.SparseAdamW([layer.delta for layer in layers], lr=1e-3)
    optimizer.step()
    other = torch.zeros(1 << 25, device=device)
    hold(
        benchmark,
        f"SparseAdamW: {sum(layer.delta.numel() for layer in layers)} values, "
        f"{len(shapes)} matrices from {shapes[0][0]} x {shapes[0][1]}",
        {"spt.SparseAdamW, weights written": optimizer.step, "128 MB += 1": lambda: other.add_(1)},
        rounds=11,
        bytes_moved=least_bytes(layers),
        growth=growth,
    )
