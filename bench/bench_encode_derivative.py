"""GELU with its derivative in 2 and 8 bits beside the exact one, and within a block's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from spt_kernels.ops.encode_derivative import code_count, decode_derivative, encode_derivative

from .bench_rebuild_input import BATCH, STEP, TOKENS, WIDTH, block_step
from .contest import hold

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 8])
def test_both_ways_beside_the_exact_ones(
    benchmark: Any, device: torch.device, bits: int, dtype: str
) -> None:
    x = torch.randn(BATCH, TOKENS, 4 * WIDTH, device=device).to(DTYPES[dtype])
    grad = torch.randn_like(x)

    def ours() -> object:
        _, codes = encode_derivative(x, "gelu", bits)
        return decode_derivative(grad, codes, "gelu", bits)

    def exact() -> object:
        return F.gelu(x), torch.ops.aten.gelu_backward(grad, x)

    ways: dict[str, Callable[[], object]] = {f"GELU in {bits} bits": ours, "GELU": exact}
    if dtype == "fp32":
        ways[STEP] = block_step(device)
    hold(
        benchmark,
        f"GELU and its backward: {BATCH} × {TOKENS} × {4 * WIDTH}, {bits} bits, {dtype}",
        ways,
        bytes_moved=4 * x.nbytes + 2 * code_count(x.numel(), bits),
    )
