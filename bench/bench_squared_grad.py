"""Per-sample squared gradients of one matrix beside the ordinary (batch) weight gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spt_kernels import ops
from spt_kernels.reference import squared_grad as reference

from .contest import hold

TOKENS = 197


def contest(
    benchmark: Any,
    device: torch.device,
    samples: int,
    out_features: int,
    in_features: int,
    *,
    dtype: torch.dtype = torch.float32,
    growth: tuple[str, float] | None = None,
) -> None:
    generator = torch.Generator().manual_seed(0)
    grad_output = torch.randn(samples, TOKENS, out_features, generator=generator).to(device, dtype)
    inputs = torch.randn(samples, TOKENS, in_features, generator=generator).to(device, dtype)
    score = torch.zeros(out_features, in_features, device=device)

    def dense() -> Tensor:
        return grad_output.flatten(0, 1).T @ inputs.flatten(0, 1)

    def per_sample() -> Tensor:
        return torch.einsum("bto,bti->boi", grad_output, inputs).square_().sum(0)

    hold(
        benchmark,
        f"squared gradients: {samples} × {TOKENS} tokens, {out_features}×{in_features}, "
        f"{str(dtype).removeprefix('torch.')}",
        {
            "spt.ops.accumulate_squared_grad": lambda: ops.accumulate_squared_grad(
                score, grad_output, inputs
            ),
            "batch gradient (not per sample)": dense,
            "reference: a product per sample in a buffer": lambda: (
                reference.accumulate_squared_grad(score, grad_output, inputs, 1.0)
            ),
            "einsum, one gradient per sample in memory": per_sample,
        },
        bytes_moved=sum(t.numel() * t.element_size() for t in (grad_output, inputs, score, score)),
        flops=2 * samples * TOKENS * out_features * in_features,
        targets={"batch gradient (not per sample)": 1.15},
        growth=growth,
    )


@pytest.mark.parametrize(
    ("out_features", "in_features"), [(3072, 768), (768, 3072), (2304, 768), (768, 768)]
)
def test_matrices_of_vit_b16(
    benchmark: Any, device: torch.device, out_features: int, in_features: int
) -> None:
    contest(benchmark, device, 16, out_features, in_features)


def test_bf16(benchmark: Any, device: torch.device) -> None:
    contest(benchmark, device, 4, 3072, 768, dtype=torch.bfloat16)


@pytest.mark.parametrize("samples", [1, 2, 4, 8, 16])
def test_growth_with_the_batch(benchmark: Any, device: torch.device, samples: int) -> None:
    growth = ("samples of 197 tokens, 768×768", samples)
    contest(benchmark, device, samples, 768, 768, growth=growth)


@pytest.mark.parametrize("width", [192, 384, 1024])
def test_growth_with_the_width(benchmark: Any, device: torch.device, width: int) -> None:
    growth = ("width of a square matrix, 4 samples of 197 tokens", width)
    contest(benchmark, device, 4, width, width, growth=growth)
