"""The products of a LoRA on a card, each beside what a library takes for it.

On a CPU layers multiply by a library, or by C++ where calls are small: nothing here is for one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spt_kernels.ops import dropout, low_rank_down, low_rank_grad, low_rank_up_

from .contest import hold

TOKENS, RANK, SEED = 64 * 197, 8, 5
ELSEWHERE = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
WIDTHS = pytest.mark.parametrize("width", [768, 3072])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def made(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@ELSEWHERE
@WIDTHS
@DTYPES
@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_down(
    benchmark: Any, device: torch.device, width: int, dtype: torch.dtype, probability: float
) -> None:
    x = made(TOKENS, width, dtype=dtype, device=device)
    factor = made(RANK, width, dtype=torch.float32, device=device)

    def library() -> torch.Tensor:
        kept = dropout(x, probability, SEED) if probability else x
        return torch.mm(kept, factor.to(dtype).t()).mul_(1.5)

    hold(
        benchmark,
        f"a LoRA's way down, {width} to {RANK}, {dtype}, dropout {probability}",
        {
            "spt.ops.low_rank_down": lambda: low_rank_down(
                x, factor.t(), scale=1.5, probability=probability, seed=SEED
            ),
            "torch": library,
        },
        bytes_moved=x.nbytes,
        targets={"torch": 1.0},
    )


@ELSEWHERE
@WIDTHS
@DTYPES
def test_up(benchmark: Any, device: torch.device, width: int, dtype: torch.dtype) -> None:
    base = made(TOKENS, width, dtype=dtype, device=device)
    inner = made(TOKENS, RANK, dtype=dtype, device=device)
    factor = 1e-3 * made(width, RANK, dtype=torch.float32, device=device)
    hold(
        benchmark,
        f"a LoRA's way up, {RANK} to {width}, {dtype}",
        {
            "spt.ops.low_rank_up_": lambda: low_rank_up_(base, inner, factor),
            "torch": lambda: base.addmm_(inner, factor.to(dtype).t()),
        },
        bytes_moved=2 * base.nbytes,
        targets={"torch": 1.0},
    )


@ELSEWHERE
@WIDTHS
@DTYPES
def test_grad(benchmark: Any, device: torch.device, width: int, dtype: torch.dtype) -> None:
    x = made(TOKENS, width, dtype=dtype, device=device)
    inner = made(TOKENS, RANK, dtype=dtype, device=device)
    hold(
        benchmark,
        f"the gradient of a LoRA's way down, {width} to {RANK}, {dtype}, dropout 0.1",
        {
            "spt.ops.low_rank_grad": lambda: low_rank_grad(x, inner, probability=0.1, seed=SEED),
            "torch": lambda: torch.mm(inner.t(), dropout(x, 0.1, SEED)).float(),
        },
        bytes_moved=x.nbytes,
        targets={"torch": 1.0},
    )
