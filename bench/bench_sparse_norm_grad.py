"""The trained entries of a LayerNorm and of a bias on a card, each beside torch's sums of all.

On a CPU layers take torch's own sums: nothing here is for one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spt_kernels.ops import sparse_norm_grad

from .contest import hold

TOKENS, CHANNELS = 64 * 197, 768
ELSEWHERE = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def entries(n: int, channels: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    chosen = torch.randperm(channels, generator=generator)[:n].sort().values
    return chosen.to(device, torch.int32)


@ELSEWHERE
@pytest.mark.parametrize("n", [8, 64, 512])
def test_norm(benchmark: Any, device: torch.device, n: int) -> None:
    gy, x = torch.randn(2, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0)).to(device)
    weight, bias = torch.ones(CHANNELS, device=device), torch.zeros(CHANNELS, device=device)
    _, mean, rstd = torch.native_layer_norm(x, (CHANNELS,), weight, bias, 1e-6)
    index = entries(n, CHANNELS, device)

    def library() -> None:
        backward = torch.ops.aten.native_layer_norm_backward
        wanted = [False, True, True]
        _, of_weight, of_bias = backward(gy, x, (CHANNELS,), mean, rstd, weight, bias, wanted)
        of_weight.index_select(0, index)
        of_bias.index_select(0, index)

    hold(
        benchmark,
        f"{n} weights and {n} biases of a LayerNorm of {CHANNELS}, fp32",
        {
            "spt.ops.sparse_norm_grad": lambda: sparse_norm_grad(gy, x, mean, rstd, index, index),
            "torch": library,
        },
        bytes_moved=min(gy.nbytes + x.nbytes, 96 * n * TOKENS),
        targets={"torch": 1.0},
    )


@ELSEWHERE
@pytest.mark.parametrize("width", [768, 3072])
@pytest.mark.parametrize("n", [8, 512])
def test_bias(benchmark: Any, device: torch.device, n: int, width: int) -> None:
    gy = torch.randn(TOKENS, width, device=device, dtype=torch.bfloat16)
    index = entries(n, width, device)
    hold(
        benchmark,
        f"{n} biases of {width}, bf16",
        {
            "spt.ops.sparse_norm_grad": lambda: sparse_norm_grad(gy, None, None, None, None, index),
            "torch": lambda: gy.sum(0, dtype=torch.float32).index_select(0, index),
        },
        bytes_moved=min(gy.nbytes, 32 * n * TOKENS),
        targets={"torch": 1.0},
    )
