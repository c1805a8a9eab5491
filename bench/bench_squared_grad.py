"""Per-sample squared gradients of one matrix beside the ordinary (batch) weight gradient."""

from __future__ import annotations

from typing import Any

import torch

from spt_kernels import ops

from .contest import hold


def test_squared_grad(benchmark: Any, device: torch.device) -> None:
    samples, tokens, out_features, in_features = 16, 197, 3072, 768
    generator = torch.Generator().manual_seed(0)
    grad_output = torch.randn(samples, tokens, out_features, generator=generator).to(device)
    inputs = torch.randn(samples, tokens, in_features, generator=generator).to(device)
    score = torch.zeros(out_features, in_features, device=device)

    def dense() -> torch.Tensor:
        return grad_output.flatten(0, 1).T @ inputs.flatten(0, 1)

    def materialised() -> torch.Tensor:
        return torch.einsum("bto,bti->boi", grad_output, inputs).square_().sum(0)

    hold(
        benchmark,
        f"squared gradients: {samples} × {tokens} tokens, {out_features}×{in_features}, fp32",
        {
            "spt.ops.accumulate_squared_grad": lambda: ops.accumulate_squared_grad(
                score, grad_output, inputs
            ),
            "batch gradient (not per sample)": dense,
            "einsum, one gradient per sample in memory": materialised,
        },
        flops=2 * samples * tokens * out_features * in_features,
    )
