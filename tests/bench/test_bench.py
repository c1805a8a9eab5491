"""The benches' own bookkeeping: results, comparison, report, drawings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import results
from bench.contest import CONTESTS, Contest, Row, turn
from bench.cost_report import table_markdown
from bench.drawings import growth_figure, growth_points
from bench.machine import Speed
from bench.report import bench_table, newest_cpu_results, rendered
from spt_kernels.costs import CostRow, CostSetting, Table7
from spt_kernels.costs.compare import compare
from spt_kernels.costs.machine import Machine
from spt_kernels.costs.results import read

MACHINE = Machine("Some CPU (TM) 3000", 2, "avx2", {"spt_kernels": "1.2.3", "torch": "9.0"})
SPEED = Speed(bytes_per_s=2e9, flops_per_s=1e11)


def contest(ours: float, theirs: float, title: str = "sum", **more: Any) -> Contest:
    rows = (
        Row("ours", ours, 0.99 * ours, 1.01 * ours, 1.0),
        Row("theirs", theirs, 0.99 * theirs, 1.01 * theirs, ours / theirs, target=0.5),
    )
    return Contest("op", title, rows, 1e6, 1e6, SPEED.floor_ms(1e6, 1e6), **more)


def written(folder: Path, *contests: Contest) -> dict[str, Any]:
    return read(results.write(folder, MACHINE, SPEED, contests))


def test_floor_is_the_longer_of_bytes_and_operations() -> None:
    assert SPEED.floor_ms(2e6, 0) == pytest.approx(1.0)
    assert SPEED.floor_ms(2e6, 1e9) == pytest.approx(10.0)


def test_results_have_one_file_per_machine_and_version_and_keep_other_contests(
    tmp_path: Path,
) -> None:
    written(tmp_path, contest(1.0, 2.0, "first"), contest(1.0, 2.0, "second"))
    both = written(tmp_path, contest(3.0, 2.0, "second"))
    assert [path.name for path in tmp_path.iterdir()] == ["some-cpu-tm-3000-2-threads-1.2.3.json"]
    medians = {name: c["rows"][0]["median_ms"] for name, c in both["contests"].items()}
    assert medians == {"op: first": 1.0, "op: second": 3.0}
    assert both["contests"]["op: first"]["date"]


@pytest.mark.parametrize(
    ("after", "is_regression"), [(1.0, False), (1.04, False), (1.2, True), (0.5, False)]
)
def test_compare_sees_what_noise_does_not_explain(
    tmp_path: Path, after: float, is_regression: bool
) -> None:
    old = written(tmp_path / "old", contest(1.0, 2.0))
    new = written(tmp_path / "new", contest(after, 2.0))
    (change,) = compare(old, new)
    assert change.is_regression == is_regression
    # a slower machine is no regression
    (change,) = compare(old, written(tmp_path / "slow", contest(10.0, 20.0)))
    assert not change.is_regression


def test_table_marks_a_missed_target(tmp_path: Path) -> None:
    kept = written(tmp_path, contest(1.0, 4.0, "kept"), contest(3.0, 4.0, "lost"))
    table = bench_table(kept["contests"].values())
    assert table.count("missed") == 1
    assert "0.750 | 0.500, missed" in table


def test_report_replaces_what_stands_between_markers_and_refuses_unknown_ones() -> None:
    text = "a\n<!-- op:begin -->\nold\n<!-- op:end -->\nb\n"
    assert rendered(text, {"op": lambda: "new"}) == text.replace("old", "new")
    with pytest.raises(ValueError, match="'op'"):
        rendered(text, {})


def test_each_part_is_of_the_cpu_that_measured_it_last(tmp_path: Path) -> None:
    def machine(name: str, threads: int, **parts: str) -> None:
        entries = {part: {"it": {"date": date}} for part, date in parts.items()}
        about = {"machine": {"processor": name, "threads": threads}}
        (tmp_path / f"{name}.json").write_text(json.dumps(about | entries))

    machine("old", 2, tables="2026-01-01", contests="2026-01-02")
    machine("card", 0, tables="2026-03-01", contests="2026-03-01")
    with pytest.raises(FileNotFoundError, match="no others of a CPU"):
        newest_cpu_results("others", tmp_path)
    machine("new", 2, tables="2026-02-01")
    newest = [newest_cpu_results(part, tmp_path)["machine"] for part in ("tables", "contests")]
    assert [own["processor"] for own in newest] == ["new", "old"]


def test_turn_reads_the_same_runs_for_another_of_ours() -> None:
    turned = turn(contest(1.0, 2.0), "theirs", {"ours": 3.0})
    assert CONTESTS.pop() is turned
    assert [row.name for row in turned.rows] == ["theirs", "ours"]
    assert turned.rows[1].ours_over_this == 2.0
    assert turned.rows[1].target == 3.0


def test_growth_is_drawn_in_order_of_size(tmp_path: Path) -> None:
    points = [contest(x, 2 * x, f"at {x}", axis="nnz", at=x) for x in (100.0, 1.0, 10.0)]
    measured = written(tmp_path, *points, contest(1.0, 2.0))
    lines = growth_points(measured)
    assert [c["at"] for c in lines["op", "nnz"]] == [1.0, 10.0, 100.0]
    panel = growth_figure(measured).axes[0]
    assert panel.get_xlabel() == "nnz"
    assert [line.get_label() for line in panel.lines] == ["ours", "theirs", "floor of ours"]
    with pytest.raises(ValueError, match="no points"):
        growth_figure(written(tmp_path / "none", contest(1.0, 2.0)))


def test_a_cards_table_has_its_kernels() -> None:
    rows = (
        CostRow("lora-16", 5, 0.1, 100, tuning_peak_bytes=2**30, kernels=500, kernel_ms=20.0),
        CostRow("spt-lora", 5, 0.1, 100, tuning_peak_bytes=2**29, kernels=600, kernel_ms=19.0),
    )
    table = Table7(CostSetting(device="cuda", step="captured"), rows)
    machine = {"processor": "Some card", "threads": 0, "versions": {"torch": "9"}}
    text = table_markdown(table, machine, "today")
    assert (
        "| **spt-lora** | 10.00 % | 0.50 | 0.50 |  | not run | 19.0 | 0.95 | 600 | 1.20 |" in text
    )
    assert "fp32, captured; peak" in text
    assert "on Some card. torch 9" in text
    on_cpu = table_markdown(Table7(CostSetting(), rows), machine, "today")
    assert "kernels" not in on_cpu
