"""Cost tables on disk, and what a comparison of two calls worse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spt_kernels.costs import CostRow, CostSetting, SensitivitySpeed, Table7
from spt_kernels.costs.compare import compare
from spt_kernels.costs.results import add_table, read
from spt_kernels.costs.row import Spread
from spt_kernels.costs.sensitivity_speed import EXACT, LOOP

SETTING = CostSetting(batch_size=4)


def spread(ms: float) -> Spread:
    return Spread(ms, 0.99 * ms, 1.01 * ms)


def row(name: str, step: float, peak: int = 1000, **more: Any) -> CostRow:
    values = {
        "method": name, "trained": 10, "trained_share": 0.1, "inference": spread(1.0),
        "inference_over_plain": 1.0, "inference_peak_bytes": 500, "tuning_peak_bytes": peak,
        "accounted_peak_bytes": peak,
        "step": spread(100 * step), "step_over_full": step, "file_bytes": 100,
        "operators": 1000, "kernels": 560, "kernel_ms": 8.0,
    }  # fmt: skip
    return CostRow(**(values | more))


TABLE = Table7(
    SETTING,
    (row("full", 1.0), row("lora-16", 0.8), row("spt-lora", 0.7)),
    {"prompt-deep": "no tokens"},
    SensitivitySpeed({EXACT: spread(1.0), LOOP: spread(1.2)}, 4, {"vmap": "out of memory"}),
)


def with_row(number: int, **changes: Any) -> Table7:
    rows = list(TABLE.rows)
    rows[number] = replace(rows[number], **changes)
    return replace(TABLE, rows=tuple(rows))


def results_of(folder: Path, table: Table7) -> dict[str, Any]:
    return read(add_table(folder, table))


def test_a_table_comes_back_from_its_file_with_date_and_commit(tmp_path: Path) -> None:
    (entry,) = results_of(tmp_path, TABLE)["tables"].values()
    assert Table7.from_json(entry) == TABLE
    assert {"date", "commit"} <= set(entry)


def test_a_file_from_before_kernels_were_counted_is_read(tmp_path: Path) -> None:
    (entry,) = results_of(tmp_path, TABLE)["tables"].values()
    del entry["setting"]["step"]
    for row in entry["rows"]:
        for name in ("operators", "kernels", "kernel_ms"):
            del row[name]
    rows = tuple(replace(r, operators=0, kernels=0, kernel_ms=0.0) for r in TABLE.rows)
    assert Table7.from_json(entry) == replace(TABLE, rows=rows)


def test_tables_of_other_sizes_are_kept_beside_and_the_same_one_is_replaced(tmp_path: Path) -> None:
    add_table(tmp_path, TABLE)
    add_table(tmp_path, replace(TABLE, setting=replace(SETTING, dtype="bf16")))
    kept = results_of(tmp_path, with_row(2, tuning_peak_bytes=7))["tables"]
    assert len(kept) == 2
    peaks = {entry["setting"]["dtype"]: entry["rows"][2]["tuning_peak_bytes"]
             for entry in kept.values()}  # fmt: skip
    assert peaks == {"fp32": 7, "bf16": 1000}


@pytest.mark.parametrize(
    ("number", "changes", "worse"),
    [
        (2, {}, []),
        (2, {"tuning_peak_bytes": 1005}, []),  # another version may round otherwise
        (2, {"tuning_peak_bytes": 1020}, ["spt-lora, tuning_peak_bytes"]),
        (2, {"file_bytes": 150}, ["spt-lora, file_bytes"]),
        (2, {"step_over_full": 0.72}, []),  # within the noise
        (2, {"step_over_full": 0.9}, ["spt-lora, step / full", "spt-lora, step / lora-16"]),
        (1, {"step_over_full": 1.5, "tuning_peak_bytes": 9000}, []),  # a rival's own matter
        (2, {"inference_over_plain": 1.2}, ["spt-lora, inference / plain"]),
        (2, {"operators": 1100, "kernels": 560}, ["spt-lora, operators"]),
        (2, {"kernel_ms": 10.0}, ["spt-lora, kernels / full", "spt-lora, kernels / lora-16"]),
    ],
)
def test_what_is_worse(
    tmp_path: Path, number: int, changes: dict[str, Any], worse: list[str]
) -> None:
    old = results_of(tmp_path / "old", TABLE)
    new = results_of(tmp_path / "new", with_row(number, **changes))
    found = [change.name for change in compare(old, new) if change.is_regression]
    assert sorted(name.rpartition(": ")[2] for name in found) == worse


def test_slower_scores_are_worse_only_against_the_loop_of_the_same_run(tmp_path: Path) -> None:
    def scored(ours: float, loop: float) -> dict[str, Any]:
        speed = SensitivitySpeed({EXACT: spread(ours), LOOP: spread(loop)}, 4, {})
        return results_of(tmp_path / f"{ours}-{loop}", replace(TABLE, sensitivity=speed))

    old = scored(1.0, 1.2)
    assert not any(change.is_regression for change in compare(old, scored(10.0, 12.0)))
    (worst, *_) = compare(old, scored(2.0, 1.2))
    assert worst.is_regression
    assert "sensitivity" in worst.name


def test_a_file_that_holds_no_results_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"notes\.json"):
            read(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "vit_small_patch16_224"},
        {"model_args": {"depth": 2}},
        {"image_size": 96},
        {"batch_size": 8},
    ],
)
def test_the_papers_figures_stand_beside_its_own_sizes_alone(changes: dict[str, Any]) -> None:
    usual = Table7(CostSetting(dtype="bf16"), ())
    assert usual.papers["full"].tuning_gb == 11.9
    assert not replace(usual, setting=replace(usual.setting, **changes)).papers


def test_whatever_changes_a_figure_changes_the_name_of_its_table() -> None:
    changes: list[dict[str, Any]] = [
        {}, {"model": "resnet18"}, {"model_args": {"depth": 2}}, {"image_size": 96},
        {"batch_size": 8}, {"timed_batch_size": 8}, {"num_classes": 10}, {"dtype": "bf16"},
        {"rank": 4}, {"rounds": 0},
    ]  # fmt: skip
    titles = {replace(SETTING, **change).title() for change in changes}
    assert len(titles) == len(changes)


@pytest.mark.parametrize(
    "parts",
    [
        {"contests": {"sum": {}}},
        {"contests": {"sum": {"rows": [{"name": "ours"}, {"name": "theirs"}]}}},
        {"tables": [1]},
        {"tables": {"vit": {"setting": {}}}},
        {"tables": {"vit": {"setting": {"dtype": "fp8"}, "rows": [], "sensitivity": None}}},
    ],
)
def test_results_of_another_form_are_one_clear_error(tmp_path: Path, parts: Any) -> None:
    old = results_of(tmp_path, TABLE)
    with pytest.raises(ValueError, match="new: expected results as this version writes them"):
        compare(old, {"machine": {}, **parts})
