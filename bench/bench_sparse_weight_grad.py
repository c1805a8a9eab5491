"""The gradient of selected weight entries beside the dense weight gradient it replaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spt_kernels import ops

from .contest import hold

OUT, IN, TOKENS = 3072, 768, 64 * 197


def uniform_index(density: float) -> Tensor:
    """Positions drawn uniformly: the hardest mask, since it touches every row and column."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(OUT * IN, generator=generator)[: int(density * OUT * IN)]
    return order.sort().values.int()


def clustered_index(density: float) -> Tensor:
    """Positions in a fifth of the rows and a third of the columns, as sensitivities cluster."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(OUT, generator=generator)[: OUT // 5]
    columns = torch.randperm(IN, generator=generator)[: IN // 3]
    block = (rows[:, None] * IN + columns).flatten()
    chosen = torch.randperm(block.numel(), generator=generator)[: int(density * OUT * IN)]
    return block[chosen].sort().values.int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("mask", "density"),
    [
        ("uniform", 0.005),
        ("uniform", 0.02),
        ("uniform", 0.05),
        ("uniform", 0.5),
        ("clustered", 0.02),
    ],
)
def test_sparse_weight_grad(
    benchmark: Any, device: torch.device, mask: str, density: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(TOKENS, OUT, generator=generator).to(device, dtype)
    inputs = torch.randn(TOKENS, IN, generator=generator).to(device, dtype)
    index = (uniform_index if mask == "uniform" else clustered_index)(density).to(device)
    hold(
        benchmark,
        f"sparse weight gradient: {OUT}×{IN}, {TOKENS} tokens, {dtype}, {density:.1%} {mask}",
        {
            "spt.ops.sparse_weight_grad": lambda: ops.sparse_weight_grad(
                grad_output, inputs, index
            ),
            "dense gradient, then gather": lambda: (grad_output.T @ inputs).flatten()[index.long()],
        },
        rounds=5,
        flops=2 * TOKENS * index.numel(),
        bytes_moved=TOKENS * (OUT + IN) * dtype.itemsize,
    )
