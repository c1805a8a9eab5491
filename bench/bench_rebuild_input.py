"""Rebuilding the inputs of a ViT-B/16 block from what LayerNorm and GELU keep, beside a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_kernels.ops.rebuild_input import rebuild_gelu, rebuild_layer_norm

from .contest import hold

BATCH, TOKENS, WIDTH, CLASSES = 8, 197, 768, 100
STEP = "the block's share of a training step"
TARGET = 0.02  # of a step, for all the inputs that a block rebuilds


def block_step(device: torch.device) -> Callable[[], object]:
    """Forward and backward, to the input alone, of one frozen block: the least a step costs."""
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", num_classes=CLASSES, depth=1)
    block: nn.Module = model.blocks[0].requires_grad_(False).to(device).train()
    x = torch.randn(BATCH, TOKENS, WIDTH, device=device, requires_grad=True)
    gy = torch.randn(BATCH, TOKENS, WIDTH, device=device)
    return lambda: torch.autograd.grad(block(x), x, gy)


def rebuild_block(device: torch.device) -> Callable[[], object]:
    """The inputs of qkv, fc1 and fc2 of one block."""
    x = torch.randn(BATCH, TOKENS, WIDTH, device=device)
    hidden = torch.randn(BATCH, TOKENS, 4 * WIDTH, device=device)
    weight, bias = torch.randn(WIDTH, device=device), torch.randn(WIDTH, device=device)
    _, mean, rstd = torch.native_layer_norm(x, (WIDTH,), weight, bias, 1e-6)

    def rebuild() -> tuple[Tensor, ...]:
        return (
            rebuild_layer_norm(x, mean, rstd, weight, bias, 1, x.dtype),
            rebuild_layer_norm(x, mean, rstd, weight, bias, 1, x.dtype),
            rebuild_gelu(hidden, "none", x.dtype),
        )

    return rebuild


def test_rebuild_within_a_step(benchmark: Any, device: torch.device) -> None:
    elements = BATCH * TOKENS * WIDTH * (1 + 1 + 4)
    hold(
        benchmark,
        f"rebuild the inputs of one block: ViT-B/16, batch {BATCH}, fp32",
        {"rebuild of three inputs": rebuild_block(device), STEP: block_step(device)},
        bytes_moved=2 * 4 * elements,
        targets={STEP: TARGET},
    )


@pytest.mark.parametrize("producer", ["layer_norm", "gelu"])
def test_rebuild_beside_the_forward(benchmark: Any, device: torch.device, producer: str) -> None:
    width = WIDTH if producer == "layer_norm" else 4 * WIDTH
    x = torch.randn(BATCH, TOKENS, width, device=device)
    weight, bias = torch.randn(width, device=device), torch.randn(width, device=device)
    if producer == "gelu":
        ways: dict[str, Callable[[], object]] = {
            "rebuild_gelu": lambda: rebuild_gelu(x, "none", x.dtype),
            "F.gelu": lambda: F.gelu(x),
        }
    else:
        _, mean, rstd = torch.native_layer_norm(x, (width,), weight, bias, 1e-6)
        ways = {
            "rebuild_layer_norm": lambda: rebuild_layer_norm(
                x, mean, rstd, weight, bias, 1, x.dtype
            ),
            "F.layer_norm": lambda: F.layer_norm(x, (width,), weight, bias, 1e-6),
        }
    ways["a copy of the input"] = x.clone
    hold(
        benchmark,
        f"rebuild after {producer}: {BATCH} × {TOKENS} × {width}, fp32",
        ways,
        bytes_moved=2 * x.numel() * x.element_size(),
    )
