"""Top-τ of ViT-B/16's scores beside a full top-k and one plain pass."""

from __future__ import annotations

from typing import Any

import torch

from spt_kernels import ops

from .contest import hold


def test_top_tau_86m(benchmark: Any, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = [[(768, 768)] * 4 + [(3072, 768)] * 2 + [(768,)] * 6 for _ in range(12)]
    shapes = [shape for block in blocks for shape in block]
    # squared gradients spread over many orders of magnitude, and differ from matrix to matrix
    scores = [
        (torch.randn(shape, generator=generator) * torch.rand(1, generator=generator)).square()
        for shape in shapes
    ]
    scores = [score.to(device) for score in scores]
    flat = torch.cat([score.flatten() for score in scores])
    tau = 400_000
    hold(
        benchmark,
        f"top-τ: {flat.numel() / 1e6:.0f}M fp32 in {len(scores)} tensors, τ = {tau}",
        {
            "spt.ops.top_tau": lambda: ops.top_tau(scores, tau),
            "torch.max, one pass (not a selection)": flat.max,
            "torch.topk of the concatenation": lambda: flat.topk(tau),
        },
        rounds=5,
        bytes_moved=4 * flat.numel(),
    )
