"""One optimizer step for a few values of ViT-B/16, written into its weights, beside fused AdamW."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.finetuning.demo import one_thread
from spt_kernels.kernels import adamw_plan
from spt_kernels.optim import planned_entries

from .contest import hold, turn

VIT_B = [(768, 768)] * 48 + [(3072, 768)] * 12 + [(768, 3072)] * 12
FUSED_QKV = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12
FUSED, FOREACH = "torch AdamW(fused) on the values", "torch AdamW(foreach) on the values"
ELSEWHERE = "spt.SparseAdamW, gradients elsewhere"
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


def test_beside_the_values_alone(benchmark: Any, device: torch.device) -> None:
    layers = sparse_layers(FUSED_QKV, 590_000, torch.float32, device)
    sparse = spt.SparseAdamW([layer.delta for layer in layers], lr=1e-3)
    trained = sum(layer.delta.numel() for layer in layers)
    hold(
        benchmark,
        f"AdamW: {trained} values in {len(FUSED_QKV)} matrices; torch's writes no weight",
        {"spt.SparseAdamW, weights written": sparse.step, **torchs_own(layers)},
        rounds=30,
        bytes_moved=least_bytes(layers),
        targets={FUSED: 1.0} if device.type == "cuda" else None,
    )


def torchs_own(layers: list[spt.SparseDeltaLinear]) -> dict[str, Callable[[], object]]:
    """Steps of torch's AdamW on as many values, which belong to no weight."""
    steps = {}
    for name, options in ((FUSED, {"fused": True}), (FOREACH, {"foreach": True})):
        values = [nn.Parameter(torch.zeros_like(layer.delta)) for layer in layers]
        for value in values:
            value.grad = torch.ones_like(value)
        steps[name] = torch.optim.AdamW(values, lr=1e-3, **options).step  # type: ignore[arg-type]
    return steps


@one_thread()
def test_host_of_a_step_on_a_card(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What surrounds the launches, with tensors of a CPU, whose addresses take as long to read.

    Torch's steps run on a CPU, where their arithmetic on a few values is included.
    """
    shapes = [(8, 8)] * 48
    layers = sparse_layers(shapes, 48 * 4, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(adamw_plan, "prepared_launch", lambda *_, **__: lambda *_: None)
    monkeypatch.setattr(planned_entries, "_OnCpu", planned_entries._OnCuda)
    monkeypatch.setattr(planned_entries, "on_card", lambda _: contextlib.nullcontext())
    sparse = spt.SparseAdamW(halves(layers), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(sparse, lambda step: 0.999**step)

    grads = itertools.cycle([[torch.ones_like(layer.delta) for layer in layers] for _ in range(2)])

    def with_other_gradients() -> None:
        for layer, grad in zip(layers, next(grads), strict=True):
            layer.delta.grad = grad
        sparse.step()

    sparse.step()
    assert sparse._prepared is not None
    contest = hold(
        benchmark,
        f"host of a step on a card, without its launches: {len(shapes)} matrices, one thread",
        {
            "spt.SparseAdamW": sparse.step,
            ELSEWHERE: with_other_gradients,
            "a schedule's step alone": schedule.step,
            **torchs_own(layers),
        },
        rounds=100,
        targets={FUSED: 1.0},
    )
    turn(contest, ELSEWHERE, {FUSED: 1.0})


def halves(layers: list[spt.SparseDeltaLinear]) -> list[dict[str, Any]]:
    """Two groups, as `param_groups` makes them."""
    deltas = [layer.delta for layer in layers]
    return [{"params": deltas[::2]}, {"params": deltas[1::2], "weight_decay": 0.0}]


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
