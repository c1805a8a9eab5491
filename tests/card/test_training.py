"""Tuning, training, saving and merging of a model that is on a (pretended) card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import spt_kernels as spt

from . import steps
from .on_card import CARD, OnCard, Pretence
from .pretend import pretended_card


@pytest.mark.parametrize("kind", steps.KINDS)
def test_a_card_trains_what_a_cpu_trains(tmp_path: Path, kind: str | None) -> None:
    base = steps.tiny_vit()
    expected, _ = steps.train_and_save(base, kind, "cpu", tmp_path / "cpu")
    with pretended_card():
        losses, model = steps.train_and_save(base, kind, "cuda", tmp_path / "card")
        assert all(p.device == CARD for p in [*model.parameters(), *model.buffers()])
        torch.testing.assert_close(torch.stack(losses).cpu(), torch.stack(expected))


@pytest.mark.parametrize("kind", steps.KINDS)
def test_a_task_goes_onto_a_card_and_off_it(tmp_path: Path, kind: str | None) -> None:
    base = steps.tiny_vit()
    _, tuned = steps.train_and_save(base, kind, "cpu", tmp_path / "task")
    images, _ = steps.make_batch()
    expected = tuned.eval()(images)
    with pretended_card():
        plain = steps.tiny_vit().to("cuda")
        before = {name: p.cpu() for name, p in plain.state_dict().items()}
        spt.load_delta(plain, tmp_path / "task")
        torch.testing.assert_close(plain.eval()(images.to("cuda")).cpu(), expected)
        spt.unload(plain)
        for name, p in plain.state_dict().items():
            assert torch.equal(p.cpu(), before[name]), name
        if kind != "adapter":
            spt.merge(spt.load_delta(plain, tmp_path / "task"))
            torch.testing.assert_close(plain(images.to("cuda")).cpu(), expected)


def test_a_tuned_model_moves_to_a_card(tmp_path: Path) -> None:
    base = steps.tiny_vit()
    _, model = steps.train_and_save(base, "lora", "cpu", tmp_path / "task")
    images, target = steps.make_batch()
    expected = F.cross_entropy(model.eval()(images), target)
    with pretended_card():
        model.to("cuda")
        assert all(isinstance(p, OnCard) for p in [*model.parameters(), *model.buffers()])
        loss = F.cross_entropy(model(images.to("cuda")), target.to("cuda"))
        torch.testing.assert_close(loss.detach().cpu(), expected.detach())
        loss.backward()
        spt.SparseAdamW(spt.param_groups(model), lr=1e-3).step()


def test_a_step_never_waits_for_the_card(tmp_path: Path) -> None:
    base = steps.tiny_vit()
    with pretended_card() as pretence:
        _, model = steps.train_and_save(base, "lora", "cuda", tmp_path / "task")
        optimizer = spt.SparseAdamW(spt.param_groups(model), lr=1e-3)
        images, target = (part.to("cuda") for part in steps.make_batch())

        def step() -> None:
            F.cross_entropy(model(images), target).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        before = pretence.waits
        step()
        assert pretence.waits == before


def test_what_a_card_refuses_is_refused() -> None:
    with pretended_card():
        ours, other = torch.ones(3, device="cuda"), torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            ours + other
        with pytest.raises(RuntimeError, match="same device"):
            torch.nn.Linear(3, 2)(ours)
        with pytest.raises(TypeError, match="numpy"):
            ours.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device="cuda", generator=torch.Generator())
        assert (ours[torch.tensor([0, 2])] + torch.tensor(1.0)).device == CARD
        before = Pretence.waits
        assert float(ours.sum()) == 3.0
        assert Pretence.waits == before + 1
