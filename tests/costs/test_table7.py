"""The cost table as a whole: what becomes of it when a row fails."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, replace
from typing import Any

import pytest

from spt_kernels.costs import CostRow, CostSetting, Table7, run_table7, table7
from spt_kernels.costs.drawing import cost_figure

SETTING = CostSetting(
    model="vit_tiny_patch16_224", model_args={"img_size": 32, "depth": 1}, num_classes=5
)
ROW = CostRow("linear", 5, 0.1, 200, None, None, 100, 200, None, None, 300)


def test_a_row_whose_process_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, input: str, **__: Any) -> subprocess.CompletedProcess[str]:
        if json.loads(input)["row"] == ROW.method:
            found = json.dumps(asdict(ROW))
            return subprocess.CompletedProcess([], 0, f"a library's words\n{found}\n", "")
        return subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no card")

    monkeypatch.setattr(table7.subprocess, "run", run)
    kept: list[Table7] = []
    table = run_table7(SETTING, ("linear", "full"), kept=kept.append)
    reason = "its process failed: RuntimeError: no card"
    assert table.rows == (ROW,)
    assert table.missing == {"full": reason, "sensitivity": reason}
    assert table.sensitivity is None
    assert kept[0] == Table7(SETTING, (ROW,))  # before the second row was begun


@pytest.mark.parametrize(("peak_bytes", "unit"), [(3 << 20, "MiB"), (3 << 30, "GiB")])
def test_bars_of_any_length_say_it_in_a_unit_that_shows_it(peak_bytes: int, unit: str) -> None:
    [memory] = cost_figure(Table7(SETTING, (replace(ROW, tuning_peak_bytes=peak_bytes),))).axes
    assert f"{unit} (accounted)" in memory.get_title(loc="left")
    assert [label.get_text() for label in memory.texts] == ["3.0"]
