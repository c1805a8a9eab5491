"""Every row of the cost table trains, deploys and says what it costs."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace

import pytest
import torch

from spt_kernels.costs import ROWS, CostSetting, Table7, run_table7, timing, worker
from spt_kernels.costs.drawing import cost_figure
from spt_kernels.costs.measure import measure_row
from spt_kernels.costs.paper import PAPER_ROWS
from spt_kernels.costs.sensitivity_speed import (
    measure_sensitivity_speed,
    square_batch_gradients,
    square_with_vmap,
)
from spt_kernels.costs.setting import budget_of
from tests.methods import every
from tests.pictures import titles

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
SETTING = CostSetting(
    model="vit_tiny_patch16_224",
    model_args=SMALL,
    batch_size=4,
    timed_batch_size=2,
    num_classes=5,
    rounds=1,
)
SWIN = CostSetting(
    model="swin_tiny_patch4_window7_224",
    model_args={"img_size": 28, "window_size": 7, "embed_dim": 24, "depths": [1, 1],
                "num_heads": [2, 2]},
    batch_size=2, timed_batch_size=1, num_classes=3, rounds=1,
)  # fmt: skip


def _deep(depth: int) -> CostSetting:
    return replace(SETTING, model_args=SMALL | {"depth": depth})


def _setting(name: str) -> CostSetting:
    # an Adapter of rank 32 costs more than what a single block is given
    return _deep(2) if name == "sensitive-adapter-32" else SETTING


@pytest.mark.parametrize("name", ROWS)
def test_a_row(name: str) -> None:
    every.method(name)  # skips what cannot be here
    setting = _setting(name)
    row = measure_row(name, setting)
    assert row.step is not None
    assert row.inference is not None
    assert row.tuning_peak_bytes > row.inference_peak_bytes > 0
    assert row.file_bytes > 0
    model = setting.build()
    if setting.method(name, model).budget is not None:
        assert row.trained <= budget_of(model)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16-autocast", "bf16"])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_on_a_card(name: str, dtype: str) -> None:
    every.method(name)
    row = measure_row(name, replace(_setting(name), dtype=dtype, device="cuda"))
    assert row.note == ""
    assert row.step is not None
    assert row.kernels > 0
    assert row.kernel_ms > 0
    assert row.inference is not None


def test_memory_tells_the_methods_apart() -> None:
    peaks = {
        name: measure_row(name, _deep(6)).tuning_peak_bytes for name in ("full", "spt-unstructured")
    }
    assert peaks["spt-unstructured"] < 0.9 * peaks["full"]


def test_a_row_of_memory_alone() -> None:
    row = measure_row("spt-lora", CostSetting(**{**SETTING.to_json(), "rounds": 0}))
    assert row.step is None
    assert row.inference is None
    assert row.tuning_peak_bytes == measure_row("spt-lora", SETTING).tuning_peak_bytes


@pytest.mark.parametrize("dtype", ["bf16-autocast", "bf16"])
@pytest.mark.parametrize("name", [name for name in ROWS if name.startswith("peft")])
def test_peft_in_other_precisions(name: str, dtype: str) -> None:
    every.method(name)
    row = measure_row(name, replace(SETTING, dtype=dtype))
    assert row.step is not None
    if dtype == "bf16":  # autocast casts small weights of a small model for little in return
        fp32 = measure_row(name, replace(SETTING, rounds=0))
        assert row.tuning_peak_bytes < fp32.tuning_peak_bytes


def test_a_library_that_is_not_installed_is_left_out_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for name in ROWS:
        if name.startswith("peft"):
            with pytest.raises(ValueError, match=r"needs peft: pip install 'spt_kernels\[peft\]'"):
                measure_row(name, SETTING)


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


def test_table_runs_rows_in_their_own_processes() -> None:
    told: list[str] = []
    table = run_table7(SWIN, ("linear",), sensitivity=False, told=told.append)
    assert [row.method for row in table.rows] == told == ["linear"]
    assert table.to_json()["paper"] == {}
    assert titles(cost_figure(table))[1].startswith("time of a step")
    assert Table7.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_a_process_says_what_its_model_does_not_admit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"row": "prompt-shallow", "setting": SWIN.to_json()}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(asked)))
    worker.main()
    assert "prompts" in json.loads(capsys.readouterr().out)["error"]


def test_a_machine_that_is_slow_for_a_while_changes_no_ratio(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slowed = iter([1.0, 3.0, 1.0, 1.0, 5.0, 1.0])  # in each round, the first one warms up
    factor, called = 1.0, []

    def elapsed(run, setting: CostSetting) -> float:
        nonlocal factor
        if run == "ours":
            factor = next(slowed)
        called.append(run)
        return factor * (8.0 if run == "ours" else 10.0)

    monkeypatch.setattr(timing, "_elapsed_ms", elapsed)
    time, ratio = timing.against("ours", "theirs", replace(CostSetting(), rounds=5))  # type: ignore[arg-type]
    assert ratio == pytest.approx(0.8)
    assert (time.median_ms, time.min_ms, time.max_ms) == (8.0, 8.0, 40.0)
    assert called == ["ours", "theirs"] * 6


def test_images_of_another_size() -> None:
    vit = CostSetting(model="vit_tiny_patch16_224", image_size=48, num_classes=3)
    convnext = CostSetting(model="convnext_atto", image_size=48, num_classes=3)
    for setting in (vit, convnext):
        model = setting.build()
        shape = setting.image_shape(model)
        assert shape == (3, 48, 48)
        assert model(torch.zeros(1, *shape)).shape == (1, 3)
        assert "48 pixels" in setting.title()


def test_unknown_method_and_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match="method: expected one of"):
        run_table7(SETTING, ("lora-x",))
    with pytest.raises(ValueError, match="dtype must be"):
        CostSetting(dtype="fp8")
    with pytest.raises(ValueError, match="timm has no"):
        run_table7(CostSetting(model="vit_bse_patch16"), ("linear",))


def test_paper_rows_are_rows() -> None:
    assert set(PAPER_ROWS) <= set(ROWS)
