"""The tables of docs/OFFLOAD.md are those of the committed results, and the bench measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import offload

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "offload"


@pytest.mark.parametrize("name", ["accounted", "states"])
def test_the_page_has_the_table_of_the_results(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert offload.main(["table", str(RESULTS / f"{name}.json")]) == 0
    assert capsys.readouterr().out in (ROOT / "docs" / "OFFLOAD.md").read_text()


def test_rows_are_whole_and_offloading_saves() -> None:
    rows = json.loads((RESULTS / "accounted.json").read_text())["rows"]
    assert len(rows) == 2 * len(offload.MODELS) * len(offload.DTYPES) * len(offload.BATCHES)
    for row in rows:
        assert row["offloaded_peak_bytes"] < row["peak_bytes"]
        # what is fetched once or twice a step, in 16 bits
        assert 0 < row["fetched_bytes"] < 2 * row["host_bytes"]


def test_a_step_is_measured_with_and_without(tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    assert offload.main(["measure", "--device", "cpu", "--output", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["on_host"]["fetched_bytes"] > 0
    assert "fetched_bytes" not in row["on_card"]
    assert row["on_host"]["ms"]["median_ms"] > 0
