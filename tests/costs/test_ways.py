"""Every row of the cost table trains, deploys and says what it costs."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

from spt_kernels.costs import WAYS, CostSetting, Table7, run_table7
from spt_kernels.costs.drawing import cost_figure
from spt_kernels.costs.measure import measure_row
from spt_kernels.costs.paper import PAPER_ROWS
from spt_kernels.costs.peers import PEERS, accountable
from spt_kernels.costs.prepared import Prepared, budget_of
from spt_kernels.costs.sensitivity_speed import (
    measure_sensitivity_speed,
    square_batch_gradients,
    square_with_vmap,
)

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


def prepare(way: str) -> Prepared:
    """Skips what needs a library, or a version of one, that is not here."""
    if way in PEERS:
        peft = pytest.importorskip("peft")
        if way == "peft-super-tuning" and not hasattr(peft, "SupertuningConfig"):
            pytest.skip(f"peft {peft.__version__} has no Super-Tuning")
    return WAYS[way](SETTING.build(), SETTING)


def types_of(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("way", WAYS)
def test_a_row(way: str) -> None:
    prepare(way)
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
    prepared = prepare(way)
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


def test_a_row_of_memory_alone() -> None:
    row = measure_row("spt-lora", CostSetting(**{**SETTING.to_json(), "rounds": 0}))
    assert row.step is None
    assert row.inference is None
    assert row.tuning_peak_bytes == measure_row("spt-lora", SETTING).tuning_peak_bytes


@pytest.mark.parametrize("dtype", ["bf16-autocast", "bf16"])
@pytest.mark.parametrize("way", PEERS)
def test_peers_in_other_precisions(way: str, dtype: str) -> None:
    prepare(way)
    fp32 = measure_row(way, CostSetting(**{**SETTING.to_json(), "rounds": 0}))
    row = measure_row(way, CostSetting(**{**SETTING.to_json(), "dtype": dtype}))
    assert row.step is not None
    if dtype == "bf16":  # autocast casts small weights of a small model for little in return
        assert row.tuning_peak_bytes < fp32.tuning_peak_bytes


def test_a_peer_that_is_not_installed_is_left_out_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for way in PEERS:
        with pytest.raises(ValueError, match="peft is not installed"):
            measure_row(way, SETTING)


def test_accountable_shira_computes_what_shira_does() -> None:
    model = prepare("peft-shira").model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shira" in name:
                parameter.normal_()
    images = torch.randn(2, 3, 32, 32)
    theirs = model(images)
    with accountable(model):
        ours = model(images)
        assert any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(ours, theirs)
    assert not any("forward" in vars(module) for module in model.modules())


def test_sensitivity_speed_is_of_whole_batches_whatever_the_precision() -> None:
    for dtype in ("fp32", "bf16"):
        speed = measure_sensitivity_speed(CostSetting(**{**SETTING.to_json(), "dtype": dtype}))
        assert speed.batch_size == SETTING.timed_batch_size
        assert len(speed.per_sample) == 4
        assert min(spread.min_ms for spread in speed.per_sample.values()) > 0
        assert not speed.missing
    with pytest.raises(ValueError, match="rounds"):
        measure_sensitivity_speed(CostSetting(**{**SETTING.to_json(), "rounds": 0}))


def test_vmap_gives_what_the_loop_gives() -> None:
    torch.manual_seed(0)
    model = SETTING.build().eval()
    names = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    images, target = torch.randn(5, 3, 32, 32), torch.arange(5)
    ones = list(zip(images.split(1), target.split(1), strict=True))
    loop = square_batch_gradients(model, names, ones)
    chunks = square_with_vmap(model, names, (images, target))
    for name in names:
        torch.testing.assert_close(chunks[name], loop[name])


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


def test_images_of_another_size() -> None:
    vit = CostSetting(model="vit_tiny_patch16_224", image_size=48, num_classes=3)
    convnext = CostSetting(model="convnext_atto", image_size=48, num_classes=3)
    for setting in (vit, convnext):
        model = setting.build()
        shape = setting.image_shape(model)
        assert shape == (3, 48, 48)
        assert model(torch.zeros(1, *shape)).shape == (1, 3)
        assert "48 pixels" in setting.title()


def test_unknown_way_and_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match="ways must be from"):
        run_table7(SETTING, ("lora-17",))
    with pytest.raises(ValueError, match="dtype must be"):
        CostSetting(dtype="fp8")
    with pytest.raises(ValueError, match="timm has no"):
        run_table7(CostSetting(model="vit_bse_patch16"), ("linear",))


def test_paper_rows_are_ways() -> None:
    assert set(PAPER_ROWS) <= set(WAYS)
