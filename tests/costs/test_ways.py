"""Every row of the cost table trains, deploys and says what it costs."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from spt_kernels.costs import WAYS, CostSetting, Table7, run_table7
from spt_kernels.costs.drawing import cost_figure
from spt_kernels.costs.measure import measure_row, measure_sensitivity_speed
from spt_kernels.costs.paper import PAPER_ROWS
from spt_kernels.costs.ways import budget_of

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SETTING = CostSetting(
    model="vit_tiny_patch16_224",
    model_args=SMALL,
    batch_size=4,
    timed_batch_size=2,
    num_classes=5,
    rounds=1,
)
STAYS = ("prompt-deep", "spt-adapter")  # what cannot be folded into the plain model


def types_of(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("way", WAYS)
def test_a_row(way: str) -> None:
    row = measure_row(way, SETTING)
    assert row.step is not None
    assert row.inference is not None
    assert row.tuning_peak_bytes > row.inference_peak_bytes > 0
    if way != "full":
        assert row.trained <= budget_of(SETTING.build())
    assert (row.file_bytes > 0) == (way not in ("dense-gradient", "published-layer"))


@pytest.mark.parametrize("way", WAYS)
def test_training_moves_the_loss_and_deploying_keeps_the_output(way: str) -> None:
    torch.manual_seed(0)
    plain = SETTING.build()
    prepared = WAYS[way](SETTING.build(), SETTING)
    images, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    losses = []
    prepared.model.eval()  # no dropout: the loss must fall
    for _ in range(4):
        loss = nn.functional.cross_entropy(prepared.model(images), target)
        loss.backward()
        prepared.optimizer.step()
        prepared.optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        before = prepared.model(images)
        deployed = prepared.for_inference(prepared.model)
        torch.testing.assert_close(deployed(images), before, rtol=1e-4, atol=1e-5)
    assert (types_of(deployed) == types_of(plain)) == (way not in STAYS)


def test_memory_tells_the_ways_apart() -> None:
    deep = CostSetting(**{**SETTING.to_json(), "model_args": {**SMALL, "depth": 6}})
    peaks = {way: measure_row(way, deep).tuning_peak_bytes for way in ("full", "spt-unstructured")}
    assert peaks["spt-unstructured"] < 0.9 * peaks["full"]


def test_sensitivity_speed_is_of_whole_batches() -> None:
    speed = measure_sensitivity_speed(SETTING)
    assert speed.batch_size == SETTING.timed_batch_size
    assert min(speed.exact, speed.loop, speed.batch_squared) > 0


def test_table_runs_rows_in_their_own_processes_and_says_what_is_missing() -> None:
    swin = CostSetting(
        model="swin_tiny_patch4_window7_224",
        model_args={"img_size": 28, "window_size": 7, "embed_dim": 24, "depths": [1, 1],
                    "num_heads": [2, 2]},
        batch_size=2, timed_batch_size=1, num_classes=3, rounds=1,
    )  # fmt: skip
    told: list[str] = []
    table = run_table7(swin, ("linear", "prompt-deep"), sensitivity=False, told=told.append)
    assert [row.way for row in table.rows] == ["linear"]
    assert "prompts" in table.missing["prompt-deep"]
    assert told == ["linear", "prompt-deep"]
    assert table.to_json()["paper"] == {}
    assert len(cost_figure(table).axes) == 2
    assert Table7.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_unknown_way_and_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match="ways must be from"):
        run_table7(SETTING, ("lora-17",))
    with pytest.raises(ValueError, match="dtype must be"):
        CostSetting(dtype="fp8")


def test_paper_rows_are_ways() -> None:
    assert set(PAPER_ROWS) <= set(WAYS)
