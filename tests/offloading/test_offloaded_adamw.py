"""AdamW with its state on the host is `torch.optim.AdamW` to the last bit."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.memory import estimate_memory
from tests.models import tiny_vit

from .runs import assert_same, loss_of, train, tuned, values_of

SMALL = 30_000  # bytes: several pieces, and parameters that are larger than one


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups that differ in everything."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": params[::2], "lr": 1e-2, "weight_decay": 0.3},
        {"params": params[1::2], "betas": (0.8, 0.99), "maximize": True},
    ]


def offloaded(model: nn.Module, **how: Any) -> spt.OffloadedAdamW:
    return spt.OffloadedAdamW(groups(model), piece_bytes=SMALL, **how)


def torchs(model: nn.Module, **how: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(model), **how)


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = optimizer.state_dict()["state"]
    return [state[key][name] for key in sorted(state) for name in ("step", "exp_avg", "exp_avg_sq")]


def assert_same_state(found: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    pairs = zip(state_of(found), state_of(expected), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("method", ["full", "spt-unstructured"])
@pytest.mark.parametrize("how", [{}, {"fused": True}, {"foreach": True}])
def test_steps_are_torchs(method: str, how: dict[str, Any]) -> None:
    made = []

    def keep(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        made.append(optimizer)
        return optimizer

    model, other = tuned(method), tuned(method)
    found = train(model, lambda m: keep(offloaded(m, **how)))
    assert_same(found, train(other, lambda m: keep(torchs(m, **how))))
    assert_same_state(*made)
    pieces = made[0]._pieces
    assert len(pieces) > 3 or method != "full"
    assert all(buffer.untyped_storage().nbytes() == 0 for buffer in made[0].buffers)


def test_of_the_state_three_pieces_are_there_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned("full")
    optimizer = offloaded(model)
    most = []
    update = spt.OffloadedAdamW._update

    def watched(self: spt.OffloadedAdamW, piece: Any) -> None:
        most.append(sum(b.untyped_storage().nbytes() > 0 for b in self.buffers))
        update(self, piece)

    monkeypatch.setattr(spt.OffloadedAdamW, "_update", watched)
    loss_of(model, 0).backward()
    optimizer.step()
    assert len(most) == len(optimizer.buffers)
    assert max(most) == 3


def test_state_goes_to_torchs_adamw_and_comes_back() -> None:
    model, other = tuned("full"), tuned("full")
    mine, theirs = offloaded(model), torchs(other)
    for round_ in range(2):
        for each, optimizer in ((model, mine), (other, theirs)):
            for seed in range(2):
                torch.manual_seed(seed)
                loss_of(each, seed).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert_same(([], values_of(model)), ([], values_of(other)))
        assert_same_state(mine, theirs)
        if round_ == 0:
            saved = pickle.loads(pickle.dumps((mine.state_dict(), theirs.state_dict())))
            mine, theirs = offloaded(model), torchs(other)
            mine.load_state_dict(saved[1])
            theirs.load_state_dict(saved[0])


def test_a_state_is_loaded_past_the_device() -> None:
    weight = nn.Parameter(torch.ones(3))
    theirs = torch.optim.AdamW([weight])
    weight.grad = torch.ones(3)
    theirs.step()
    elsewhere = nn.Parameter(torch.ones(3, dtype=torch.bfloat16, device="meta"))
    optimizer = spt.OffloadedAdamW([elsewhere])
    optimizer.load_state_dict(theirs.state_dict())  # what were on `meta` once would be lost
    for name in ("exp_avg", "exp_avg_sq"):
        found, expected = optimizer.state[elsewhere][name], theirs.state[weight][name]
        assert torch.equal(found, expected.bfloat16())


def test_a_state_with_gaps_in_its_memory_is_loaded() -> None:
    """As columns of a larger one have them: they would reach into what lies beside them."""
    found = []
    for kind in (torch.optim.AdamW, spt.OffloadedAdamW):
        weights = [nn.Parameter(torch.ones(40, 8)) for _ in range(3)]
        optimizer = kind(weights, lr=0.1)
        state = optimizer.state_dict()
        means = torch.arange(2 * 40 * 16.0).view(2, 40, 16)[:, :, :8]
        state["state"] = {0: dict(zip(("exp_avg", "exp_avg_sq"), means, strict=True))}
        state["state"][0]["step"] = torch.tensor(1.0)
        optimizer.load_state_dict(state)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        found.append([weight.detach() for weight in weights])
    assert all(map(torch.equal, *found))


def test_a_state_of_several_dtypes_can_be_saved() -> None:
    weights = [nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.bfloat16, torch.float32)]
    optimizer, file = spt.OffloadedAdamW(weights), io.BytesIO()
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    for n, state in torch.load(file)["state"].items():
        assert torch.equal(state["exp_avg"], torch.full_like(weights[n], 0.1))


def test_a_copy_goes_on_by_itself() -> None:
    model = tuned("full")
    optimizer = offloaded(model)
    loss_of(model, 0).backward()
    optimizer.step()
    again = copy.deepcopy({"model": model, "optimizer": optimizer})
    for each, stepper in ((model, optimizer), (again["model"], again["optimizer"])):
        each.zero_grad()
        loss_of(each, 1).backward()
        stepper.step()
    assert_same(([], values_of(model)), ([], values_of(again["model"])))


def test_parameters_without_gradients_stay() -> None:
    model, other = tuned("full"), tuned("full")
    for each, optimizer in ((model, offloaded(model)), (other, torchs(other))):
        loss_of(each, 0).backward()
        for parameter in each.blocks[1].parameters():  # type: ignore[index,union-attr]
            parameter.grad = None
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        optimizer.step(lambda: None)
        scheduler.step()
        optimizer.step()
    assert_same(([], values_of(model)), ([], values_of(other)))


def test_a_step_without_gradients_is_none() -> None:
    model = tuned("full")
    optimizer, before = offloaded(model), values_of(model)
    optimizer.step()
    assert_same(([], values_of(model)), ([], before))
    assert optimizer.fetched_bytes == 0


def test_parameters_without_elements_may_come_first() -> None:
    weights = [nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.ones(2))]
    optimizer = spt.OffloadedAdamW(weights, lr=0.5)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weights[1].tolist() == pytest.approx([0.495, 0.495])


def test_it_is_accounted_for() -> None:
    model = tiny_vit(depth=4, width=96)
    usual, less = (
        estimate_memory(model, (1, 3, 16, 16), optimizer=make, device="cpu")
        for make in (lambda m: torchs(m, fused=True), lambda m: offloaded(m, fused=True))
    )
    state = 8 * sum(p.numel() for p in model.parameters())
    assert state <= less.host_bytes == less.fetched_bytes < 1.1 * state
    assert less.peak_bytes < usual.peak_bytes - state / 2


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"piece_bytes": 0}, ValueError, "piece_bytes must be at least 1, got 0"),
        ({"piece_bytes": 1.0}, TypeError, "piece_bytes must be a whole number, got 1.0"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate"),
    ],
)
def test_arguments(how: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        spt.OffloadedAdamW([nn.Parameter(torch.ones(2))], **how)


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = spt.OffloadedAdamW(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"needs dense gradients, got torch\.sparse_coo"):
        optimizer.step()


def test_what_is_refused_leaves_it_training() -> None:
    weight, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer, theirs = spt.OffloadedAdamW([weight]), torch.optim.AdamW([weight], amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad: expected False"):
        optimizer.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match="amsgrad: expected False"):
        optimizer.add_param_group({"params": [other], "amsgrad": True})
    assert len(optimizer.param_groups) == 1
    weight.grad = torch.ones(2)
    optimizer.step()
    assert bool((weight < 1).all())
