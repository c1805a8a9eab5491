"""Training on a pretended card with every op's own kernel, launched as for a card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import spt_kernels as spt
from tests.card import steps
from tests.card.pretend import pretended_card
from tests.models import tiny_batch, tiny_vit


@pytest.mark.parametrize("kind", steps.KINDS)
def test_training(tmp_path: Path, kind: str | None) -> None:
    base = steps.tiny_vit()
    expected, on_cpu = steps.train_and_save(base, kind, "cpu", tmp_path / "cpu")
    with pretended_card():
        losses, model = steps.train_and_save(base, kind, "cuda", tmp_path / "card")
        torch.testing.assert_close(torch.stack(losses).cpu(), torch.stack(expected))
        trained = {name: p.detach().cpu() for name, p in model.named_parameters()}
        spt.load_delta(base.to("cuda"), tmp_path / "cpu")  # fingerprints agree across devices
    for name, parameter in on_cpu.named_parameters():
        torch.testing.assert_close(trained[name], parameter, rtol=1e-5, atol=1e-5, msg=name)


def test_sensitivity_and_allocation() -> None:
    model, budget = tiny_vit(depth=1), 300
    images, target = tiny_batch(4)
    expected = spt.measure_sensitivity(model, [(images, target)], F.cross_entropy, 4)
    with pretended_card():
        batch = images.to("cuda"), target.to("cuda")
        found = spt.measure_sensitivity(model.to("cuda"), [batch], F.cross_entropy, 4)
        assert found.fallback == expected.fallback
        for name, score in expected.items():
            torch.testing.assert_close(found[name].cpu(), score, rtol=1e-3, atol=1e-9)
        plan = spt.allocate(found, budget)
        assert 0 < plan.num_trainable <= budget


def test_approximate_gradients() -> None:
    model = spt.approximate(tiny_vit(depth=1), gelu="2bit", layer_norm="from-output")
    images, target = tiny_batch(4)

    def gradients(device: str) -> list[torch.Tensor]:
        model.to(device).zero_grad()
        F.cross_entropy(model(images.to(device)), target.to(device)).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients("cpu")
    with pretended_card():
        found = [grad.cpu() for grad in gradients("cuda")]
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-5)
