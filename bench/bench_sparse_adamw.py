"""One optimizer step for 0.4M values of ViT-B/16 beside fused dense AdamW on the masked model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import spt_kernels as spt

from .contest import hold

SHAPES = [(768, 768)] * 48 + [(3072, 768)] * 12 + [(768, 3072)] * 12


def test_sparse_adamw_04m(benchmark: Any, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    share = 400_000 / sum(rows * columns for rows, columns in SHAPES)
    layers = []
    for rows, columns in SHAPES:
        linear = nn.Linear(columns, rows, bias=False)
        nnz = round(share * rows * columns)
        index = torch.randperm(rows * columns, generator=generator)[:nnz].sort().values
        layers.append(spt.SparseDeltaLinear(linear, index).to(device))
    for layer in layers:
        layer.delta.grad = torch.randn(layer.delta.shape, generator=generator).to(device)
    sparse = spt.SparseAdamW([layer.delta for layer in layers], lr=1e-3)
    dense_weights: list[Tensor] = [
        layer.weight.detach().clone().requires_grad_() for layer in layers
    ]
    for weight in dense_weights:
        weight.grad = torch.zeros_like(weight)
    dense = torch.optim.AdamW(dense_weights, lr=1e-3, fused=True)
    hold(
        benchmark,
        f"AdamW: {sum(layer.delta.numel() for layer in layers)} values in {len(SHAPES)} matrices",
        {"spt.SparseAdamW, weights written": sparse.step, "torch AdamW(fused), dense": dense.step},
        bytes_moved=sum(layer.delta.numel() for layer in layers) * (7 * 4 + 4 + 4 + 4),
    )
