"""What is computed a second time, counted, and what is not kept for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from spt_kernels import recompute
from spt_kernels.memory.ledger import Ledger
from spt_kernels.memory.twin import fake_copy
from tests.models import tiny_batch, tiny_vit

from .steps import tuned

WIDTH, BATCH, TOKENS, DEPTH = 48, 2, 17, 2
PRODUCT = 2 * BATCH * TOKENS * WIDTH**2  # of all tokens with a square matrix, in FLOPs
QKV, PROJ, FC1 = 3 * PRODUCT, PRODUCT, 4 * PRODUCT


def whole(depth: int = DEPTH) -> nn.Module:
    return tiny_vit(depth=depth, width=WIDTH).train()


def biases(depth: int = DEPTH) -> nn.Module:
    model = whole(depth)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name)
    return model


def lora() -> nn.Module:
    return tuned(whole(), "lora")


def entries() -> nn.Module:
    return tuned(whole(), None)


def flops_of_step(model: nn.Module) -> int:
    images, target = tiny_batch(BATCH)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(images), target).backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("make", [whole, biases, lora, entries])
def test_no_product_is_computed_again_that_nothing_needs(make: Callable[[], nn.Module]) -> None:
    model = make()
    plain = flops_of_step(model)
    # the CPU's fused attention is no product that is counted; a LoRA's thin ones come on top
    allowed = {
        "mlp": FC1,
        "qkv": QKV,
        ("mlp", "qkv"): FC1 + QKV,
        "attention": QKV,
        "block": QKV + PROJ + FC1,
    }
    for what, flops in allowed.items():
        recompute(model, what)
        added = (flops_of_step(model) - plain) / DEPTH
        assert flops <= added < flops + (PROJ if make is lora else 1), what


def bytes_kept(what: str | tuple[str, ...], depth: int) -> int:
    """What a forward leaves behind for the backward of biases alone."""
    model = biases(depth)
    recompute(model, what)
    ledger, fakes = Ledger(), FakeTensorMode(allow_non_fake_inputs=True)
    model, _ = fake_copy(model, fakes)
    with fakes, ledger:
        ledger.mark(model.parameters(), "weights")
        ledger.begin_forward()
        output = model(torch.empty(BATCH, 3, 16, 16))
        ledger.end_forward()
    kept = ledger.bytes_alive()["activations"]
    del output
    return kept


def test_what_is_computed_again_is_not_kept() -> None:
    of_width = BATCH * TOKENS * WIDTH * 4
    # inputs of the norms, q, k, v, what attention gives, and the hidden activations
    whole_block = 1 + 3 + 1 + 1 + 4
    left = {"nothing": 0, "mlp": 4, "qkv": 3, ("mlp", "qkv"): 7, "attention": 4, "block": 9}
    for what, share in left.items():
        of_a_block = bytes_kept(what, 3) - bytes_kept(what, 2)
        statistics = of_a_block - (whole_block - share) * of_width
        assert 0 <= statistics <= 0.2 * of_width, what
