"""The ordinary step against a loop that is written out."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spt_kernels.optim import SparseAdamW, param_groups
from spt_kernels.plan import allocate
from spt_kernels.recomputation import recompute
from spt_kernels.sensitivity import skewed_sensitivity
from spt_kernels.step import TrainingStep
from spt_kernels.tuning import apply
from tests.models import tiny_batch, tiny_vit


def batches(n: int) -> list[tuple[Tensor, Tensor]]:
    return [tiny_batch(seed=seed) for seed in range(n)]


def twins() -> tuple[nn.Module, torch.optim.Optimizer, nn.Module, torch.optim.Optimizer]:
    one = tiny_vit(depth=1).train()
    other = copy.deepcopy(one)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (one, other)]
    return one, optimizers[0], other, optimizers[1]


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_it_is_the_loop() -> None:
    model, optimizer, twin, twins_own = twins()
    step = TrainingStep(model, F.cross_entropy, optimizer, clip_grad=0.5)
    for images, labels in batches(3):
        loss = step(images, labels)
        expected = F.cross_entropy(twin(images), labels)
        twins_own.zero_grad()
        expected.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        twins_own.step()
        assert torch.equal(loss, expected.detach())
        assert not loss.requires_grad
    assert_same(model, twin)


def test_several_batches_are_one() -> None:
    model, _, twin, _ = twins()
    optimizer, twins_own = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    step = TrainingStep(model, F.cross_entropy, optimizer, accumulate=2)
    whole = TrainingStep(twin, F.cross_entropy, twins_own)
    data = batches(4)
    for first, second in (data[:2], data[2:]):
        losses = step(*first), step(*second)
        both = whole(torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
        torch.testing.assert_close(sum(losses) / 2, both)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("clip_grad", [None, 0.5])
@pytest.mark.parametrize("scaled", [False, True])
def test_an_update_that_fails_is_not_the_last(scaled: bool, clip_grad: float | None) -> None:
    model, _, twin, _ = twins()
    optimizer, twins_own = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    step, twins_step = (
        TrainingStep(
            each,
            F.cross_entropy,
            own,
            accumulate=2,
            clip_grad=clip_grad,
            scaler=torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled),
        )
        for each, own in ((model, optimizer), (twin, twins_own))
    )
    first, second, *rest = batches(6)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    handle = optimizer.register_step_pre_hook(fail)
    step(*first)
    with pytest.raises(torch.OutOfMemoryError):
        step(*second)
    handle.remove()
    for batch in rest:
        step(*batch)
        twins_step(*batch)
    assert_same(model, twin)


@pytest.mark.parametrize("kind", [SparseAdamW, partial(torch.optim.AdamW, fused=True)])
def test_a_scale_is_told_once(kind: Any) -> None:
    """To an optimizer that unscales gradients itself, when the update before has failed."""
    model, _, twin, _ = twins()
    optimizer, twins_own = (kind(m.parameters(), lr=1e-2) for m in (model, twin))
    scaled = partial(TrainingStep, scaler=torch.amp.GradScaler("cpu"))
    step = scaled(model, F.cross_entropy, optimizer)
    first, second = batches(2)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        step(*first)
    handle.remove()
    step(*second)
    scaled(twin, F.cross_entropy, twins_own)(*second)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(optimizer.state[mine]["exp_avg"], twins_own.state[theirs]["exp_avg"])


def test_a_batch_that_fails_leaves_nothing_to_the_next_update() -> None:
    model, optimizer, twin, twins_own = twins()
    calls = []

    def loss_fn(output: Tensor, labels: Tensor) -> Tensor:
        calls.append(labels)
        if len(calls) == 4:  # the second part of the second batch
            raise torch.OutOfMemoryError
        return F.cross_entropy(output, labels)

    step = TrainingStep(model, loss_fn, optimizer, accumulate=2, micro_batch=2)
    twins_step = TrainingStep(twin, F.cross_entropy, twins_own, accumulate=2, micro_batch=2)
    first, second, *rest = batches(4)
    step(*first)
    with pytest.raises(torch.OutOfMemoryError):
        step(*second)
    for batch in rest:
        step(*batch)
        twins_step(*batch)
    assert_same(model, twin)


@pytest.mark.parametrize("name", ["accumulate", "micro_batch", "clip_grad"])
def test_numbers_are_above_zero(name: str) -> None:
    model, optimizer, *_ = twins()
    with pytest.raises(ValueError, match=f"{name}: expected a .*number above zero, got 0"):
        TrainingStep(model, F.cross_entropy, optimizer, **{name: 0})


def test_parts_of_a_batch_are_the_batch() -> None:
    model, _, twin, _ = twins()
    optimizer, twins_own = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    step = TrainingStep(model, F.cross_entropy, optimizer, accumulate=2, micro_batch=3)
    whole = TrainingStep(twin, F.cross_entropy, twins_own, accumulate=2)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    for batch in (tiny_batch(7), tiny_batch(3, seed=2)):  # a ragged one, and one that is a part
        torch.testing.assert_close(step(*batch), whole(*batch))
    assert seen == [3, 3, 1, 3]
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("clip_grad", [None, 0.5])
def test_scaler_and_autocast(clip_grad: float | None) -> None:
    model, optimizer, twin, twins_own = twins()
    scaler, twins_scaler = (torch.amp.GradScaler("cpu", init_scale=64.0) for _ in range(2))
    step = TrainingStep(
        model,
        F.cross_entropy,
        optimizer,
        autocast=torch.bfloat16,
        scaler=scaler,
        clip_grad=clip_grad,
    )
    for images, labels in batches(3):
        loss = step(images, labels)
        with torch.autocast("cpu", torch.bfloat16):
            expected = F.cross_entropy(twin(images), labels)
        twins_own.zero_grad()
        twins_scaler.scale(expected).backward()
        if clip_grad is not None:
            twins_scaler.unscale_(twins_own)
            nn.utils.clip_grad_norm_(twin.parameters(), clip_grad)
        twins_scaler.step(twins_own)
        twins_scaler.update()
        assert torch.equal(loss, expected.detach())
    assert_same(model, twin)


def test_an_overflow_in_one_part_skips_the_whole_batch() -> None:
    model = tiny_vit(depth=1)
    apply(model, allocate(skewed_sensitivity(model), 300, rank=1, dropout=0.0))
    twin = copy.deepcopy(model.train())
    recompute(model, "block")
    steps = []
    for each, most in ((model, 3), (twin, None)):
        optimizer = SparseAdamW(param_groups(each), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        how = {"autocast": torch.float16, "scaler": scaler, "clip_grad": 0.5, "micro_batch": most}
        steps.append(TrainingStep(each, F.cross_entropy, optimizer, **how))
    start = [p.detach().clone() for p in model.parameters()]
    images, labels = tiny_batch(8)
    overflowing = images.clone()
    overflowing[7] = float("inf")  # in the last part of three
    for step in steps:
        step(overflowing, labels)
        assert step.scaler is not None
        assert step.scaler.get_scale() == 32.0
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), start, strict=True))
    for _ in range(2):
        mine, theirs = (step(images, labels) for step in steps)
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=2e-3)
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=1e-2, msg=name)
    assert not torch.equal(model.head.weight, start[-2])


def test_a_scaler_that_is_off_does_nothing() -> None:
    model, optimizer, twin, twins_own = twins()
    off = torch.amp.GradScaler("cpu", enabled=False)
    batch = tiny_batch()
    TrainingStep(model, F.cross_entropy, optimizer, scaler=off)(*batch)
    TrainingStep(twin, F.cross_entropy, twins_own)(*batch)
    assert_same(model, twin)
