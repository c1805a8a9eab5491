"""Parameters that the loss does not depend on score 0, and are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt
from tests.models import tiny_batch
from tests.sensitivity.per_sample_truth import assert_exact

IMAGES, LABELS = tiny_batch(4)


class Towers(nn.Module):
    """One tower that the loss reads, and others that run for nothing, or do not run at all."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(768, 8), nn.LayerNorm(8), nn.Linear(8, 5)
        self.pooler = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.never = nn.Conv2d(3, 4, 3)
        self.table = nn.Parameter(torch.randn(1, 8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.norm(self.body(x.flatten(1)))
        pooled = self.pooler(features) @ self.table.t()
        return {"logits": self.head(features), "pooled": pooled}


def loss_of(output: dict[str, Tensor], target: Tensor) -> Tensor:
    return F.cross_entropy(output["logits"], target)


def measured(model: nn.Module, **how: Any) -> spt.Sensitivity:
    how = {"loss_fn": loss_of, "progress": False} | how
    return spt.measure_sensitivity(model, [(IMAGES, LABELS)] * 2, num_samples=8, **how)


def test_an_idle_layer_scores_zero_and_the_rest_is_exact(caplog) -> None:
    torch.manual_seed(0)
    model = Towers()
    sensitivity = measured(model, include=["table"])
    idle = {"pooler.0.weight", "pooler.0.bias", "pooler.1.weight", "pooler.1.bias"}
    idle |= {"never.weight", "never.bias", "table"}
    assert set(sensitivity.idle) == idle
    assert not any(sensitivity[name].any() for name in idle)
    assert sensitivity.head == ("head.weight", "head.bias")
    [record] = caplog.records
    assert "does not depend on 7 of 11 parameters, which score 0" in record.message
    assert all(part in record.message for part in ("pooler", "never", "table"))
    assert "idle" in repr(sensitivity)
    assert_exact(sensitivity, model, [(IMAGES, LABELS)] * 2, loss_of)


def test_a_plan_takes_nothing_that_is_idle_and_says_how_much_there_is() -> None:
    sensitivity = measured(Towers())
    n_reached = sum(int((sensitivity[n] > 0).sum()) for n in ("body.weight", "body.bias"))
    n_reached += sum(int((sensitivity[n] > 0).sum()) for n in ("norm.weight", "norm.bias"))
    plan = spt.allocate(sensitivity, n_reached, structured=None)
    assert set(plan.unstructured) == {"body.weight", "body.bias", "norm.weight", "norm.bias"}
    with pytest.raises(ValueError, match=rf"at most {n_reached:,} parameters"):
        spt.allocate(sensitivity, n_reached + 1, structured=None)


def test_it_is_kept_in_the_file(tmp_path) -> None:
    sensitivity = measured(Towers())
    sensitivity.save(tmp_path / "s")
    assert spt.Sensitivity.load(tmp_path / "s").idle == sensitivity.idle != ()


def test_only_a_loss_that_reads_nothing_of_what_is_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="does not depend on any parameter that is measured"):
        measured(Towers(), exclude=["body.*", "norm.*"])


class Routed(nn.Module):
    """Each sample goes through one of two experts, as its first pixel says."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(768, 8)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.scales = nn.ParameterList([torch.randn(8), torch.randn(8)])
        self.score = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        chosen = int(x[0, 0, 0, 0] > 0)  # one for the batch
        y = self.experts[chosen](self.body(x.flatten(1)).tanh()).tanh()
        return self.score(y * self.scales[chosen])


def test_what_wakes_in_a_later_batch_is_exact_from_then_on() -> None:
    torch.manual_seed(0)
    first, second = IMAGES.clone(), IMAGES.flip(0)
    first[:, 0, 0, 0], second[:, 0, 0, 0] = -1.0, 1.0
    model = Routed()
    batches = [(first, LABELS), (second, LABELS), (second, LABELS.flip(0))]
    sensitivity = spt.measure_sensitivity(model, batches, include=["scales.*"], progress=False)
    assert sensitivity.idle == ()
    woken = {"experts.1.weight", "experts.1.bias", "scales.1"}
    assert woken == set(sensitivity.fallback)
    assert_exact(sensitivity, model, batches)


class Mixture(nn.Module):
    """Each sample goes through one of four experts, the last of which is never chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gate, self.score = nn.Linear(768, 8), nn.Linear(8, 4), nn.Linear(8, 5)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0, 0, 0] * 3).long()
        x = self.body(x.flatten(1)).tanh()
        gates = self.gate(x).softmax(1)
        y = torch.zeros_like(x)
        for i in chosen.unique().tolist():
            [rows] = torch.where(chosen == i)
            y = y.index_put((rows,), self.experts[i](x[rows]) * gates[rows, i, None])
        return self.score(y)


def test_what_later_samples_use_of_a_model_measured_one_by_one_is_exact() -> None:
    torch.manual_seed(0)
    model, images = Mixture(), IMAGES.repeat(2, 1, 1, 1)
    images[:, 0, 0, 0] = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.8, 0.9, 0.5, 0.1])
    batches = [(images[:4], LABELS), (images[4:], LABELS.flip(0))]
    sensitivity = spt.measure_sensitivity(model, batches, progress=False)
    assert set(sensitivity.idle) == {"experts.3.weight", "experts.3.bias"}
    assert all(sensitivity[f"experts.{i}.weight"].any() for i in range(3))
    assert_exact(sensitivity, model, batches)
