"""Plans that fit by leaving early blocks alone, and that a step by one really ends there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import spt_kernels as spt
from spt_kernels.fitting import PlanWithin, allocate_within
from spt_kernels.memory import estimate_memory
from spt_kernels.methods import Method, make_plan, tune
from spt_kernels.sensitivity import skewed_sensitivity
from tests.models import tiny_batch, tiny_convnext, tiny_swin, tiny_vit

SHAPE = (16, 3, 16, 16)


def tried(model: nn.Module, limit: float, **options: Any) -> PlanWithin:
    return allocate_within(model, skewed_sensitivity(model), 60, limit, SHAPE, None, **options)


def test_one_block_earlier_does_not_fit() -> None:
    model, how = tiny_vit(depth=4, width=48), {"dtype": "bf16-autocast"}
    plans = [spt.allocate(skewed_sensitivity(model), 60, None, from_block=n) for n in (1, 2)]
    earlier, later = (estimate_memory(model, SHAPE, plan, **how) for plan in plans)
    limit = (earlier.peak_bytes + later.peak_bytes) / 2
    found = tried(model, limit + 1000, reserve_bytes=1000, **how)
    assert found.plan == plans[1]
    assert found.estimate == later
    assert found.limit_bytes == int(limit)
    assert found.tried["blocks.1"] == earlier.peak_bytes > later.peak_bytes
    assert found.tried["blocks.2"] == later.peak_bytes


def test_where_all_fits_nothing_is_forbidden() -> None:
    model = tiny_vit(depth=3)
    found = tried(model, 2**40)
    assert found.plan == spt.allocate(skewed_sensitivity(model), 60, None)
    assert list(found.tried) == [""]


def test_nothing_fits_and_a_reserve_that_is_none() -> None:
    model = tiny_vit(depth=3)
    with pytest.raises(ValueError, match=r"the least that a step needs is .*from blocks.2 on, got"):
        tried(model, 2**10)
    with pytest.raises(ValueError, match="reserve_bytes must be at least 0, got -1"):
        tried(model, 2**10, reserve_bytes=-1)
    with pytest.raises(TypeError, match="reserve_bytes must be a number of bytes, got '1'"):
        tried(model, 2**10, reserve_bytes="1")
    with pytest.raises(TypeError, match="memory_bytes must be a number of bytes, got '8 GiB'"):
        tried(model, "8 GiB")  # type: ignore[arg-type]


# ---- the step


@contextmanager
def saved(model: nn.Module) -> Iterator[Counter[str]]:
    """Counts what autograd saves while each block is called, "" before the first one."""
    counts: Counter[str] = Counter()
    place = [""]
    blocks = [n for n, m in model.named_modules() if type(m).__name__.endswith("Block")]
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda *_, name=name: place.__setitem__(0, name)
        )
        for name in blocks
    ]

    def pack(tensor: Tensor) -> Tensor:
        counts[place[0]] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counts
    for hook in hooks:
        hook.remove()


class Operators(TorchDispatchMode):
    """Counts the operators that are run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "vit": (lambda: tiny_vit(depth=4, width=48), 16, "blocks.2"),
    "swin": (tiny_swin, 32, "layers.1.blocks.0"),
    "convnext": (tiny_convnext, 32, "stages.2.blocks.0"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_below_keep_nothing(family: str) -> None:
    make, size, block = FAMILIES[family]
    model = make()
    plan = spt.allocate(skewed_sensitivity(model), 100, rank=1, from_block=block)
    spt.apply(model, plan).train()
    images, labels = tiny_batch(4, size=size)
    blocks = [n for n, m in model.named_modules() if type(m).__name__.endswith("Block")]
    with saved(model) as counts:
        loss = F.cross_entropy(model(images), labels)
    early = blocks[: blocks.index(block)]
    assert len(early) > 1
    assert not any(counts[name] for name in ("", *early))
    assert counts[blocks[-1]]
    loss.backward()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(
    "name",
    [
        "spt-lora",
        "spt-adapter",
        "spt-unstructured",
        "sensitive-lora-2",
        "spt-prompt",
        "dense-gradient",
    ],
)
def test_the_backward_has_no_more_operators_than_that_of_the_blocks_above(
    name: str, checkpointing: bool
) -> None:
    counts = []
    for depth in (2, 6):  # of which the last two are tuned
        model = tiny_vit(depth=depth, width=48)
        method = Method(name, budget=600, from_block=depth - 2)
        scores = skewed_sensitivity(model)
        first = {n: s for n, s in scores.items() if n.startswith("blocks.")}
        for own, score in first.items():  # the same in the last two blocks, whatever the depth
            number = int(own.split(".")[1]) - depth
            score.copy_(torch.linspace(1, 2 + number / 10, score.numel()).view_as(score))
        made = tune(model, method, make_plan(model, method, scores))
        made.model.set_grad_checkpointing(checkpointing)
        images, labels = tiny_batch()
        loss = F.cross_entropy(made.model.train()(images), labels)
        with Operators() as operators:
            loss.backward()
        counts.append(operators.counts)
        early = [
            n
            for n, p in model.named_parameters()
            if n < f"blocks.{depth - 2}" and p.grad is not None
        ]
        assert not early
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) > 20
