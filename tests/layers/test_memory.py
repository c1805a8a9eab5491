"""Rebuilt inputs cost no memory: storages alive after the forward of a ViT block are counted."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from spt_kernels import AdapterSpec, LoraSpec, Plan, apply
from spt_kernels.model import describe

WIDTH, BATCH, TOKENS = 48, 4, 65
ACTIVATION_BYTES = BATCH * TOKENS * WIDTH * 4


class LiveStorages(TorchDispatchMode):
    """Remembers every storage that an operation makes, weakly."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.seen or self.seen[key][0]() is None:
                    self.seen[key] = (weakref.ref(storage), storage.nbytes())
        return result

    def bytes_alive_besides(self, *known: Tensor | None) -> int:
        ours = {t.untyped_storage()._cdata for t in known if t is not None}
        return sum(
            size
            for key, (reference, size) in self.seen.items()
            if key not in ours and reference() is not None
        )


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of what the forward leaves behind for the backward, its output included."""
    model(x)  # whatever is made once
    with LiveStorages() as live:
        output = model(x)
    total = live.bytes_alive_besides(x, *model.parameters(), *model.buffers())
    assert total > output.untyped_storage().nbytes()
    return total


def block() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(WIDTH, num_heads=3, qkv_bias=True), Block(WIDTH, num_heads=3))
    # the first block's input needs a gradient, as behind any trained layer
    return model.train(), torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)


def tuned(kind: str) -> tuple[nn.Module, Tensor]:
    model, x = block()
    info = describe(model)
    matrices = [name for name, what in info.items() if what.kind == "linear"]
    assert len(matrices) == 8
    positions = {name: torch.arange(0, info[name].numel, 97) for name in matrices}
    if kind == "sparse":
        plan = Plan(positions, {}, info)
    elif kind == "lora":
        specs = {
            name: LoraSpec(2, ((0, info[name].shape[0]),), info[name].shape[1], 1.0, 0.1)
            for name in matrices
        }
        plan = Plan({}, specs, info)
    else:
        specs = {name: AdapterSpec(2, ((0, info[name].shape[0]),)) for name in matrices}
        plan = Plan({}, specs, info)
    return apply(model, plan), x


def frozen() -> tuple[nn.Module, Tensor]:
    model, x = block()
    return model.requires_grad_(False), x


def test_the_count_notices_a_saved_input() -> None:
    model, x = frozen()
    plain = kept_bytes(model, x)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("qkv.weight" in name or "fc2.weight" in name)
    dense = kept_bytes(model, x)
    # per block the output of a LayerNorm and the four times wider one of a GELU
    assert dense - plain >= 2 * (1 + 4) * ACTIVATION_BYTES


def test_sparse_deltas_keep_nothing_more_than_the_frozen_model() -> None:
    plain = kept_bytes(*frozen())
    assert kept_bytes(*tuned("sparse")) <= plain + 64


def test_lora_keeps_its_bottlenecks_alone() -> None:
    plain = kept_bytes(*frozen())
    bottlenecks = 8 * BATCH * TOKENS * 2 * 4
    assert kept_bytes(*tuned("lora")) <= plain + bottlenecks + 64


def test_without_gradients_nothing_is_kept() -> None:
    model, x = tuned("sparse")
    with torch.no_grad(), LiveStorages() as live:
        output = model(x)
    alive = live.bytes_alive_besides(x, *model.parameters(), *model.buffers())
    assert alive == output.untyped_storage().nbytes()


def test_the_backward_leaves_nothing_behind() -> None:
    model, x = tuned("lora")
    with LiveStorages() as live:
        loss = model(x).sum()
        loss.backward()
    gradients = [p.grad for p in (x, *model.parameters())]
    own = (loss, x, *model.parameters(), *model.buffers(), *gradients)
    assert live.bytes_alive_besides(*own) <= 64  # the gradient of the loss itself
