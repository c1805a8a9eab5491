"""Captured steps against the ordinary loop, to the last bit, on the pretended card."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.layers import sparse_deltas
from spt_kernels.step import CapturedStep, capture_step
from tests.card.on_card import CARD, Pretence
from tests.card.pretend import pretended_card
from tests.mappings import reader, sentences

from . import runs
from .runs import assert_same, train, tuned


@pytest.fixture(autouse=True)
def card() -> Iterator[type[Pretence]]:
    with pretended_card() as pretence:
        yield pretence


def both(method: str = "full", n: int = 4, last: int | None = None, **options: Any) -> None:
    """Train with and without capture, from the same start."""
    found, expected = (
        train(captured, tuned(method, "cuda"), runs.batches(n, "cuda", last), **options)
        for captured in (True, False)
    )
    assert_same(found, expected)
    assert len({float(loss) for loss in found[0]}) == n  # it does train


@pytest.mark.parametrize("method", runs.NAMES)
def test_step_for_step_it_is_the_loop(method: str) -> None:
    both(method)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("spt-lora", {"autocast": torch.bfloat16}),
        ("spt-lora", {"clip_grad": 0.1}),
        ("full", {"accumulate": 2}),
        ("full", {"autocast": torch.bfloat16}),
        ("spt-lora", {"accumulate": 3, "clip_grad": 0.1, "autocast": torch.bfloat16}),
    ],
    ids=["autocast", "clipped", "accumulated", "full-autocast", "all"],
)
def test_options(method: str, options: dict[str, Any]) -> None:
    both(method, 6, **options)


@pytest.mark.parametrize("what", [("mlp", "qkv"), "block"])
def test_parts_are_computed_again_with_the_same_masks(what: Any) -> None:
    found, plain = [], tuned("spt-lora", "cuda", dropout=0.3)
    for captured in (True, False):
        model = tuned("spt-lora", "cuda", dropout=0.3)
        assert spt.recompute(model, what)
        found.append(train(captured, model, runs.batches(4, "cuda")))
    assert_same(found[0], found[1])
    assert_same(found[1], train(False, plain, runs.batches(4, "cuda")))


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "clip_grad": 0.1}], ids=["", "all"])
def test_scaler_skips_what_overflows(options: dict[str, Any]) -> None:
    results = []
    for captured in (True, False):
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=2)
        data = runs.batches(6, "cuda")
        data[2] = data[2][0] * 1e38, data[2][1]  # its gradients are no numbers
        results.append(train(captured, tuned("full", "cuda"), data, scaler=scaler, **options))
        results[-1][1]["scale"] = scaler._scale.cpu()
    assert float(results[0][1]["scale"]) != 2.0**10
    steps = {float(value) for name, value in results[0][1].items() if name.endswith(".step")}
    assert steps == {2.0 if options else 5.0}
    finite = [{k: v.nan_to_num(7.0) for k, v in state.items()} for _, state in results]
    losses = [[loss.nan_to_num(7.0) for loss in made] for made, _ in results]
    assert_same((losses[0], finite[0]), (losses[1], finite[1]))


def test_a_scaler_used_before_goes_on_where_it_was() -> None:
    scales = []
    for captured in (True, False):
        scaler = torch.amp.GradScaler("cuda", init_scale=8.0, growth_interval=3)
        model, data = tuned("full", "cuda"), runs.batches(2, "cuda")
        optimizer = runs.adamw(model)
        train(False, model, data, optimizer=optimizer, scaler=scaler)
        train(captured, model, data, optimizer=optimizer, scaler=scaler)
        scales.append(scaler.get_scale())
        assert scaler._growth_tracker is not None
        scales.append(int(scaler._growth_tracker.cpu()))
    assert scales[:2] == scales[2:] == [16.0, 1]


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["fp32", "rounded-bf16"])
def test_our_own_optimizer(kind: torch.dtype, scaled: bool) -> None:
    results = []
    for captured in (True, False):
        model = tuned("spt-unstructured", "cuda").to(kind)
        groups = spt.param_groups(model)
        optimizer = spt.SparseAdamW(groups, lr=1e-2, capturable=True, stochastic_rounding=True)
        data = [(images.to(kind), labels) for images, labels in runs.batches(4, "cuda")]
        options = {"scaler": torch.amp.GradScaler("cuda", init_scale=8.0)} if scaled else {}
        results.append(train(captured, model, data, optimizer=optimizer, **options))
    assert_same(*results)


def test_dropout_of_the_model_draws_on() -> None:
    results = []
    for captured in (True, False):
        model = tuned("full", "cuda")
        model.pos_drop.p = 0.5
        results.append(train(captured, model, runs.batches(1, "cuda") * 4))
    assert_same(*results)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_dropout_of_lora_draws_on(accumulate: int) -> None:
    results = []
    for captured in (True, False):
        model = tuned("spt-lora", "cuda", dropout=0.5)
        results.append(train(captured, model, runs.batches(1, "cuda") * 4, accumulate=accumulate))
    assert_same(*results)
    still = train(True, tuned("spt-lora", "cuda"), runs.batches(1, "cuda") * 4)
    assert not torch.equal(still[0][-1], results[0][0][-1])  # something was dropped


def test_a_ragged_batch_is_computed_eagerly() -> None:
    for options in ({}, {"accumulate": 2}):
        both("spt-lora", 4, last=3, ragged="eager", **options)


def test_a_step_after_a_ragged_one_is_the_loops() -> None:
    data = runs.batches(3, "cuda")
    data.insert(1, runs.batches(1, "cuda", last=2)[0])
    for options in ({}, {"accumulate": 2}):
        results = [
            train(captured, tuned("full", "cuda"), data, ragged="eager", **options)
            for captured in (True, False)
        ]
        assert_same(*results)


def test_buffers_run_on() -> None:
    def with_norm() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(768, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)]
        return nn.Sequential(*layers).to("cuda").train()

    results = [train(captured, with_norm(), runs.batches(3, "cuda")) for captured in (True, False)]
    assert_same(*results)
    assert int(results[0][1]["2.num_batches_tracked"]) == 3


Change = Callable[[int, torch.optim.Optimizer], None]


def halve(n: int, optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"].mul_(0.5)


def put_number(n: int, optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 / (n + 1)


def put_tensor(n: int, optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(1e-2 / (n + 1))


def as_in_the_loop(change: Change) -> Change:
    """The same change for a loop, whose arithmetic is a graph's if its rate is on the card too."""

    def changed(n: int, optimizer: torch.optim.Optimizer) -> None:
        change(n, optimizer)
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32).to("cuda")

    return changed


@pytest.mark.parametrize("change", [halve, put_number, put_tensor])
def test_the_learning_rate_may_change(change: Change) -> None:
    data = runs.batches(4, "cuda")
    found = train(True, tuned("full", "cuda"), data, between=change)
    expected = train(False, tuned("full", "cuda"), data, between=as_in_the_loop(change))
    assert_same(found, expected)
    fixed = train(True, tuned("full", "cuda"), data)
    assert not torch.equal(fixed[0][-1], found[0][-1])


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
def test_schedulers_are_followed(early: bool) -> None:
    ends = []
    for captured in (True, False):
        model, data = tuned("full", "cuda"), runs.batches(5, "cuda")
        optimizer = runs.adamw(model)
        made: list[Any] = []

        def between(n: int, optimizer: Any, made: list[Any] = made) -> None:
            if not made:
                made.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5))
            elif n:
                made[0].step()

        if early:
            between(0, optimizer)
        ends.append(train(captured, model, data, optimizer=optimizer, between=between))
        ends[-1][1]["lr"] = optimizer.param_groups[0]["lr"].cpu()
    assert_same(*ends)
    assert float(ends[0][1]["lr"]) < 0.5e-2


def load_another(n: int, optimizer: torch.optim.Optimizer) -> None:
    if n == 2:
        state = optimizer.state_dict()
        for of_param in state["state"].values():
            of_param["exp_avg"] = -of_param["exp_avg"]
        state["param_groups"][0]["lr"] = 2e-2
        optimizer.load_state_dict(state)


def test_another_state_may_be_loaded() -> None:
    data = runs.batches(4, "cuda")
    found = train(True, tuned("full", "cuda"), data, between=load_another)
    expected = train(False, tuned("full", "cuda"), data, between=as_in_the_loop(load_another))
    assert_same(found, expected)


def test_state_of_a_run_without_a_graph_may_be_loaded() -> None:
    model, data = tuned("full", "cuda"), runs.batches(3, "cuda")
    params = [p for p in model.parameters() if p.requires_grad]
    loose = torch.optim.AdamW(params, lr=1e-2)
    train(False, model, data[:1], optimizer=loose)
    optimizer = runs.adamw(model)
    step = capture_step(model, F.cross_entropy, optimizer, data[0])
    step(*data[0])
    optimizer.load_state_dict(loose.state_dict())
    step(*data[1])
    state = optimizer.state[params[0]]
    assert float(state["step"]) == 2.0
    assert state["step"].device == CARD
    assert all(group["capturable"] and group["fused"] for group in optimizer.param_groups)


def test_capture_trains_nothing(card: type[Pretence]) -> None:
    model, data = tuned("spt-lora", "cuda", dropout=0.5), runs.batches(1, "cuda")
    before = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    draws = torch.get_rng_state(), random.getstate()
    optimizer = runs.adamw(model)
    capture_step(model, F.cross_entropy, optimizer, data[0])
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert random.getstate() == draws[1]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), before[name]), name
    assert all(delta.is_fresh for delta in sparse_deltas(model).values())
    for state in optimizer.state.values():
        assert all(float(value.abs().sum().cpu()) == 0 for value in state.values())


def test_a_step_never_waits(card: type[Pretence]) -> None:
    model, data = tuned("spt-lora", "cuda", dropout=0.1), runs.batches(3, "cuda", last=2)
    scaler = torch.amp.GradScaler("cuda")
    step = capture_step(
        model, F.cross_entropy, runs.adamw(model), data[0], scaler=scaler, ragged="eager"
    )
    before = card.waits
    for batch in data:
        step(*batch)
    assert card.waits == before


def test_the_loss_stays_what_it_was() -> None:
    model, data = tuned("full", "cuda"), runs.batches(3, "cuda")
    step = capture_step(model, F.cross_entropy, runs.adamw(model), data[0])
    losses = [step(*batch) for batch in data]
    at_once = [float(loss) for loss in losses]
    step(*data[0])
    assert [float(loss) for loss in losses] == at_once
    assert len(set(at_once)) == 3
    assert not any(loss.requires_grad for loss in losses)


def test_gradients_are_there_until_the_next_call() -> None:
    model, data = tuned("full", "cuda"), runs.batches(2, "cuda")
    step = capture_step(model, F.cross_entropy, runs.adamw(model), data[0])
    step(*data[0])
    weight = next(iter(model.parameters()))
    assert weight.grad is not None
    assert float(weight.grad.abs().sum().cpu()) > 0
    model.zero_grad()  # takes nothing from the graph
    one, other = (
        train(captured, tuned("full", "cuda"), data, between=lambda n, o: o.zero_grad())
        for captured in (True, False)
    )
    assert_same(one, other)


# what is refused, and what that leaves behind


def refused(model: nn.Module, match: str, kind: type[Exception], **changed: Any) -> None:
    """Capture fails, and model, optimizer and generators are as they were."""
    data = runs.batches(1, "cuda")[0]
    optimizer = changed.pop("optimizer", None) or runs.adamw(model)
    before = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    lrs = [group["lr"] for group in optimizer.param_groups]
    torch.manual_seed(3)
    random.seed(3)
    draws = torch.get_rng_state(), random.getstate()
    kept = dict(optimizer.state)
    with pytest.raises(kind, match=match):
        capture_step(model, changed.pop("loss_fn", F.cross_entropy), optimizer, data, **changed)
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert random.getstate() == draws[1]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), before[name]), name
    assert dict(optimizer.state) == kept
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, lrs, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert (Pretence.recorder, Pretence.refused) == (None, 0)


def waiting(scores: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(scores, labels)
    return loss * 2 if loss > 100 else loss


def random_on_host(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores, labels) * random.random()


def random_of_torch(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores, labels) * float(torch.rand(()))


def from_host_memory(scores: Tensor, labels: Tensor) -> Tensor:
    weight = torch.arange(5.0).to(scores.device, non_blocking=True)
    return F.cross_entropy(scores, labels, weight=weight)


@pytest.mark.parametrize(
    ("loss_fn", "match"),
    [
        (waiting, "makes the host wait for the card"),
        (random_on_host, "draws random numbers on the host"),
        (random_of_torch, "draws random numbers on the host"),
        (from_host_memory, "Cannot copy between CPU and CUDA"),
    ],
    ids=["branch", "random", "torch-random", "host-memory"],
)
@pytest.mark.parametrize("method", ["full", "spt-lora"])
def test_a_step_that_a_graph_cannot_hold(method: str, loss_fn: Any, match: str) -> None:
    refused(tuned(method, "cuda"), match, RuntimeError, loss_fn=loss_fn)


def test_an_error_of_the_step_itself_comes_through() -> None:
    def wrong(scores: Tensor, labels: Tensor) -> Tensor:
        raise KeyError("my own")

    refused(tuned("full", "cuda"), "my own", KeyError, loss_fn=wrong)


def test_state_that_was_there_comes_back() -> None:
    model, data = tuned("full", "cuda"), runs.batches(2, "cuda")
    optimizer = runs.adamw(model)
    train(False, model, data, optimizer=optimizer)
    values = [{k: v.cpu() for k, v in state.items()} for state in optimizer.state.values()]
    model.zero_grad()
    refused(model, "host wait", RuntimeError, optimizer=optimizer, loss_fn=waiting)
    for state, expected in zip(optimizer.state.values(), values, strict=True):
        assert all(torch.equal(state[name].cpu(), value) for name, value in expected.items())


def test_nothing_to_train() -> None:
    model = tuned("full", "cuda")
    stray = nn.Parameter(torch.ones(3).to("cuda"))
    optimizer = torch.optim.AdamW([stray], capturable=True)
    refused(model, "none of its parameters gets a gradient", ValueError, optimizer=optimizer)


def test_first_values_that_are_not_known() -> None:
    model = tuned("full", "cuda")
    optimizer = torch.optim.Rprop(model.parameters(), lr=1e-2, capturable=True)
    refused(model, "first value of the state 'prev'|'step_size'", RuntimeError, optimizer=optimizer)
    data = runs.batches(1, "cuda")
    train(False, model, data, optimizer=optimizer)
    capture_step(model, F.cross_entropy, optimizer, data[0])(*data[0])  # now they are


def captured() -> tuple[CapturedStep, nn.Module, torch.optim.Optimizer, tuple[Tensor, Tensor]]:
    model, data = tuned("spt-lora", "cuda"), runs.batches(1, "cuda")[0]
    optimizer = runs.adamw(model)
    step = capture_step(model, F.cross_entropy, optimizer, data)
    step(*data)
    return step, model, optimizer, data


def test_another_kind_of_batch_is_refused() -> None:
    step, _, _, (images, labels) = captured()
    with pytest.raises(TypeError, match="expected 2 tensors, got 1"):
        step(images)
    with pytest.raises(ValueError, match=r'captured with 4 samples, got 3: .*ragged="eager"'):
        step(images[:3], labels[:3])
    with pytest.raises(ValueError, match=r"batch\[0\]: expected float32 \[4, 3, 16, 16\] on cuda"):
        step(images[..., :8], labels)
    with pytest.raises(ValueError, match=r"batch\[0\]: expected float32.* got float64"):
        step(images.double(), labels)
    with pytest.raises(ValueError, match=r"batch\[1\]: expected int64 \[4\] on cuda:0, .* on cpu"):
        step(images, labels.cpu())
    with pytest.raises(ValueError, match=r"batch\[1\]: .*got list"):
        step(images, [1, 2, 3, 4])  # type: ignore[arg-type]


def test_a_changed_model_is_refused() -> None:
    step, model, _, batch = captured()
    model.eval()
    with pytest.raises(RuntimeError, match="training mode when the step was captured"):
        step(*batch)
    model.train()
    step(*batch)
    model.head = nn.Linear(24, 5).to("cuda")
    with pytest.raises(RuntimeError, match="model: head was replaced"):
        step(*batch)


def test_a_changed_option_is_refused() -> None:
    step, _, optimizer, batch = captured()
    optimizer.param_groups[0]["betas"] = (0.8, 0.99)
    with pytest.raises(RuntimeError, match=r"betas of group 0 was \(0.9, 0.999\).*OneCycleLR"):
        step(*batch)
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    step(*batch)


def test_the_example_of_the_docs() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "CAPTURED_STEP.md").read_text()
    every = re.findall(r"^```python[^\n]*\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    example, of_mappings = every
    loader = runs.batches(3, "cuda")
    names = {"spt": spt, "torch": torch, "F": F, "loader": loader, "images": loader[0][0]}
    names |= {"model": tuned("spt-lora", "cuda", dropout=0.1), "labels": loader[0][1]}
    exec(example, names)
    assert names["loss"].shape == ()
    assert float(names["optimizer"].param_groups[0]["lr"]) < 1e-3
    model = reader().to("cuda")
    batch = {name: tensor.to("cuda") for name, tensor in sentences().items()}
    names |= {"model": model, "optimizer": runs.adamw(model), "batch": batch, "loader": [batch] * 2}
    exec(of_mappings, names)
    assert torch.isfinite(names["loss"].cpu())
