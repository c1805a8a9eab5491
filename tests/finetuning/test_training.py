"""The loop against a plain torch loop, its checkpoints, its errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.layers import EvoNorm2dB0
from torch import nn

from spt_kernels.finetuning.folder.checkpoint import Checkpoint
from spt_kernels.finetuning.images.pixels import Batches, PixelSet, Preprocessing
from spt_kernels.finetuning.job.recipe import Recipe
from spt_kernels.finetuning.training.loop import EpochFigures, train
from spt_kernels.methods import Method, make_plan, tune
from spt_kernels.methods.tunable import make_optimizer
from tests.models import tiny_vit

CPU = torch.device("cpu")


def batches(seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (20, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.randint(5, (20,), generator=generator)
    form = Preprocessing(16, (0.5,) * 3, (0.5,) * 3)
    data = PixelSet.from_tensors(pixels, labels, [str(i) for i in range(5)], form)
    return Batches(data, 8, CPU, shuffle_seed=seed)


def test_full_training_is_a_plain_torch_loop() -> None:
    recipe = Recipe(epochs=3, batch_size=8, warmup_epochs=1, weight_decay=0.1)
    model, twin, data = tiny_vit().train(), tiny_vit().train(), batches()
    history = train(model, data, recipe, lr=1e-2)
    vectors = {id(p) for p in twin.parameters() if p.ndim < 2}
    tokens = {id(twin.cls_token), id(twin.pos_embed)}
    still = [p for p in twin.parameters() if id(p) in vectors | tokens]
    decayed = [p for p in twin.parameters() if id(p) not in vectors | tokens]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": still, "weight_decay": 0.0}]
    )
    losses, step = [], 0
    for epoch in range(3):
        total = 0.0
        for images, labels in data.epoch(epoch):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * recipe.lr_factor(step, len(data))
            loss = F.cross_entropy(twin(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
            step += 1
        losses.append(total / 20)
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5, msg=name)
    assert [row.train_loss for row in history] == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("after", [1, 3])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path: Path, after: int) -> None:
    recipe = Recipe(epochs=4, batch_size=8, seed=3)

    def with_dropout() -> nn.Module:
        model = tiny_vit()
        model.pos_drop.p = 0.3  # a run without random numbers would not notice lost states
        return model

    def run(model: nn.Module, stop: int | None, file: Path) -> list[EpochFigures]:
        def on_epoch(rows: list[EpochFigures]) -> None:
            if stop is not None and len(rows) == stop + 1:
                raise InterruptedError("stopped by the test")

        torch.manual_seed(7)
        return train(
            model,
            batches(),
            recipe,
            lr=1e-2,
            checkpoint=file,
            checkpoint_seconds=0,
            on_epoch=on_epoch,
        )

    whole, parts = with_dropout(), with_dropout()
    uninterrupted = run(whole, None, tmp_path / "whole.pt")
    with pytest.raises(InterruptedError):
        run(parts, after, tmp_path / "parts.pt")
    fresh = with_dropout()
    torch.manual_seed(99)
    resumed = run(fresh, None, tmp_path / "parts.pt")
    for (name, one), other in zip(whole.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert [row.train_loss for row in resumed] == [row.train_loss for row in uninterrupted]


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    model = tiny_vit()
    optimizer = make_optimizer(model, 1e-3, 0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    file = tmp_path / "checkpoint.pt"
    Checkpoint.take(1, model, optimizer, scheduler, []).save(file)
    assert Checkpoint.load(file).epoch == 1
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        Checkpoint.load(file)


def test_a_checkpoint_of_another_model_changes_nothing(tmp_path: Path) -> None:
    one, other = tiny_vit(), tiny_vit(depth=1)
    before = copy.deepcopy(other.state_dict())
    optimizer = make_optimizer(one, 1e-3, 0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    taken = Checkpoint.take(1, one, optimizer, scheduler, [])
    with pytest.raises(ValueError, match="of another model"):
        taken.restore(other, optimizer, scheduler)
    assert all(torch.equal(before[name], t) for name, t in other.state_dict().items())


def test_a_checkpoint_of_more_cards_than_there_are_is_gone_on_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_vit()
    optimizer = make_optimizer(model, 1e-3, 0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    taken = Checkpoint.take(1, model, optimizer, scheduler, [])
    states = [torch.get_rng_state() for _ in range(2)]
    taken.rng["cuda"] = states
    put: list[list[torch.Tensor]] = []
    for name, value in (
        ("is_available", lambda: True),
        ("device_count", lambda: 1),
        ("set_rng_state_all", put.append),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    taken.restore(model, optimizer, scheduler)
    assert put == [states[:1]]


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="nan in epoch 1"):
        train(model, batches(), Recipe(epochs=2, batch_size=8), lr=1e-3)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, EvoNorm2dB0])
def test_running_statistics_of_a_tuned_model_stay_those_of_its_base(
    norm: Callable[[int], nn.Module],
) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), norm(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tune(model, method := Method("bias", head="4"), make_plan(model, method))
    train(model, batches(), Recipe(epochs=1, batch_size=8), lr=1e-2)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before.get(name, buffer)), name
