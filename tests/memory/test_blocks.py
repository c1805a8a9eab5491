"""What a block of a ViT keeps for the backward, storage by storage, against a list made by hand."""

from __future__ import annotations

import functools

import pytest
from timm.models import VisionTransformer
from torch import nn

from bench.block_account import FROZEN, Account, account, needed

WIDTH, HEADS, SIZE, TOKENS = 48, 3, 64, 65  # flash attention pads nothing here


def vit() -> nn.Module:
    return VisionTransformer(
        img_size=SIZE, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=HEADS, num_classes=5
    )


@functools.cache
def of(method: str, dtype: str, device: str = "cuda", is_real: bool = False) -> Account:
    return account(method, dtype, make=vit, size=SIZE, device=device, is_real=is_real)


@pytest.mark.parametrize("dtype", ["fp32", "bf16-autocast"])
def test_tuned_blocks_keep_what_the_backward_must_find(dtype: str) -> None:
    must = sum(needed(WIDTH, HEADS, dtype).values())
    if dtype == "fp32":  # memory-efficient attention rounds the rows of its statistics up to 32
        must += 4 * HEADS * (96 - TOKENS) / TOKENS
    frozen, entries = (of(method, dtype) for method in (FROZEN, "spt-unstructured"))
    assert frozen.kept_per_token == pytest.approx(must, abs=1)
    assert entries.kept_per_token == pytest.approx(must, abs=1)
    # the four weights of a plain block in 16 bits
    assert frozen.kept_of_weights == (2 * 12 * WIDTH**2 if dtype == "bf16-autocast" else 0)
    assert entries.kept_of_weights == 0


def test_a_lora_keeps_its_bottlenecks_besides() -> None:
    found = of("lora", "bf16-autocast")
    must = sum(needed(WIDTH, HEADS, "bf16-autocast").values())
    assert found.kept_per_token - must == pytest.approx(2 * 2 * 8, abs=1)  # q and v, of rank 8
    assert found.kept_of_weights == 0


def test_real_tensors_on_a_cpu_are_kept_alike() -> None:
    fake, real = (of("lora", "bf16-autocast", "cpu", is_real) for is_real in (False, True))
    assert sorted(item.bytes for item in real.kept) == sorted(item.bytes for item in fake.kept)


def test_nothing_is_copied_for_what_a_plan_leaves_alone() -> None:
    def copies(method: str) -> tuple[list[str], list[str]]:
        found = of(method, "bf16-autocast")
        both = (found.copied_forward, found.copied_backward)
        large = ([i for i in items if i.bytes > 64 and not i.is_weight] for items in both)
        forward, backward = ([f"{i.made_by} {i.bytes:.0f}" for i in items] for items in large)
        return forward, backward

    forward, backward = copies(FROZEN)
    # the outputs of two LayerNorms, each cast once
    assert forward == ["attn.qkv _to_copy 96", "mlp.fc1 _to_copy 96"]
    # the gradients before and behind these; those of q, k and v, laid side by side and then brought
    # into the order of the product
    assert sorted(backward) == [
        *("_to_copy 192", "_to_copy 192", "_to_copy 96", "_to_copy 96", "clone 288", "stack 288")
    ]
    assert copies("lora")[0] == forward
    # our products give the gradients before the LayerNorms in fp32 themselves
    fewer = [copied for copied in backward if copied != "_to_copy 192"]
    for method in ("spt-unstructured", "adapter-8"):
        assert copies(method) == (forward, fewer)
