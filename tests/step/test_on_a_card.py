"""Captured steps on hardware: the numbers of the ordinary loop, and what failures leave behind."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.finetuning.device import reproducible

from . import runs
from .runs import assert_same, train, tuned

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def without_onednn() -> None:
    """A real card needs no precautions."""


@pytest.fixture(autouse=True)
def same_bits() -> Iterator[None]:
    with reproducible(strictly=True):  # attention as well
        yield


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    if hasattr(model, "spt_tuning"):
        return spt.SparseAdamW(spt.param_groups(model), lr=1e-2, capturable=True)
    return runs.adamw(model)


def both(
    method: str, data: list[tuple[Tensor, Tensor]], *, dropout: float = 0.0, **options: Any
) -> list[Tensor]:
    """Captured and not, from the same start; the losses."""
    found = []
    for captured in (True, False):
        model = tuned(method, "cuda", dropout=dropout)
        if dropout:
            model.pos_drop.p = 0.2  # type: ignore[union-attr]
        kept = dict(options)
        if kept.pop("scaled", False):
            kept["scaler"] = torch.amp.GradScaler("cuda", init_scale=2.0**8, growth_interval=2)
        found.append(train(captured, model, data, optimizer=optimizer_of(model), **kept))
    assert_same(*found)
    return found[0][0]


OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"autocast": torch.bfloat16, "clip_grad": 0.5},
    "fp16": {"autocast": torch.float16, "scaled": True},
    "accumulated": {"accumulate": 2, "clip_grad": 0.5},
    "all": {"autocast": torch.float16, "scaled": True, "accumulate": 2, "clip_grad": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("method", runs.NAMES)
def test_step_for_step_it_is_the_loop(method: str, options: dict[str, Any]) -> None:
    both(method, runs.batches(6, "cuda"), **options)


@pytest.mark.parametrize("method", ["spt-lora", "spt-unstructured", "lora-2", "full"])
def test_dropout_and_ragged_batches(method: str) -> None:
    data = runs.batches(6, "cuda", last=3)
    data[3] = runs.batches(1, "cuda", last=2)[0]
    losses = both(method, data, dropout=0.3, ragged="eager")
    assert not torch.equal(losses[0], both(method, data, ragged="eager")[0])


def test_the_same_batch_is_never_dropped_from_alike() -> None:
    data = runs.batches(1, "cuda") * 5

    def still(n: int, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.0

    for method in ("spt-lora", "full"):
        model = tuned(method, "cuda", dropout=0.3)
        if method == "spt-lora":  # whose up-projections are zero at first
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("lora_b"):
                        parameter.fill_(0.1)
        else:
            model.pos_drop.p = 0.3  # type: ignore[union-attr]
        losses, _ = train(True, model, data, optimizer=optimizer_of(model), between=still)
        assert len({float(loss) for loss in losses}) == 5


def test_a_scheduler_is_followed_without_a_wait() -> None:
    def run(captured: bool) -> Any:
        model = tuned("spt-unstructured", "cuda")
        optimizer = optimizer_of(model)
        made: list[Any] = []

        def between(n: int, _: Any) -> None:
            if not made:
                made.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6))
            elif n:
                made[0].step()
            # neither after the first, which may make things, nor at the end, which is read
            strict = captured and 0 < n < len(data) - 1
            torch.cuda.set_sync_debug_mode("error" if strict else "default")

        try:
            return train(captured, model, data, optimizer=optimizer, between=between)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    data = runs.batches(6, "cuda")
    assert_same(run(True), run(False))


def waits_unnoticed(scores: Tensor, labels: Tensor) -> Tensor:
    torch.cuda.synchronize()
    return F.cross_entropy(scores, labels)


def waits(scores: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(scores, labels)
    return loss * 2 if loss > 100 else loss


@pytest.mark.parametrize("loss_fn", [waits, waits_unnoticed])
def test_a_capture_that_fails_leaves_all_as_it_was(loss_fn: Any) -> None:
    model, data = tuned("spt-lora", "cuda", dropout=0.3), runs.batches(3, "cuda")
    before = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    optimizer = optimizer_of(model)
    torch.manual_seed(5)
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    with pytest.raises(RuntimeError):
        spt.capture_step(model, loss_fn, optimizer, data[0])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert not optimizer.state
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), before[name]), name
    torch.rand(3, device="cuda")  # the generator still draws
    found = train(True, model, data, optimizer=optimizer)
    twin = tuned("spt-lora", "cuda", dropout=0.3)
    assert_same(found, train(False, twin, data, optimizer=optimizer_of(twin)))


def test_peft_is_captured_too() -> None:
    pytest.importorskip("peft")
    both("peft-lora-2", runs.batches(4, "cuda"), autocast=torch.bfloat16)


def test_evaluation_between_steps_sees_what_was_learnt() -> None:
    model, data = tuned("spt-unstructured", "cuda"), runs.batches(4, "cuda")
    step = spt.capture_step(model, F.cross_entropy, optimizer_of(model), data[0])
    with torch.no_grad():
        scores = [model(data[0][0])]
        for batch in data:
            step(*batch)
            scores.append(model.eval()(data[0][0]))
            model.train()
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(scores))
    spt.merge(model)
    torch.testing.assert_close(model.eval()(data[0][0]), scores[-1])


def test_memory_is_that_of_the_loop() -> None:
    peaks = []
    # at first cuBLAS makes a workspace for each stream, 32 MiB on Hopper, which stays
    for captured in (True, True, False):
        model = tuned("spt-lora", "cuda")
        optimizer, data = optimizer_of(model), runs.batches(8, "cuda")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(captured, model, data, optimizer=optimizer)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del model, optimizer
    assert peaks[1] <= 1.5 * peaks[2] + 2**20  # a tiny model: the keys and copies of a batch count
