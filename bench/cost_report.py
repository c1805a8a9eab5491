"""The cost tables as Markdown, from the results of `spt-kernels bench table7`.

`python -m bench.cost_report FILE` prints every table of a results file.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from spt_kernels.costs import PAPER_SAMPLES, PAPER_SENSITIVITY_S, CostRow, Table7
from spt_kernels.costs.results import TABLES, read
from spt_kernels.costs.sensitivity_speed import BATCH_SQUARED
from spt_kernels.costs.setting import EAGER

from .markdown import markdown


def cost_table(measured: Mapping[str, Any], methods: Collection[str] | None = None) -> str:
    """What each method costs, or some do, with the paper's memory beside it."""
    table, date = papers_table(measured)
    if methods is not None:
        rows = tuple(row for row in table.rows if row.method in methods)
        missing = {name: why for name, why in table.missing.items() if name in methods}
        table = replace(table, rows=rows, missing=missing)
    return table_markdown(table, measured["machine"], date)


def table_markdown(table: Table7, machine: Mapping[str, Any], date: str) -> str:
    """One cost table, and how it was measured."""
    setting = table.setting
    on_card = ("kernels, ms", "/ LoRA-16", "kernels", "/ LoRA-16") if setting.on_gpu else ()
    peak = "peak, GiB" if setting.on_gpu else "peak, GiB (accounted)"
    times = ("step / full", *on_card, "inference / plain")
    titles = ("", "trained", peak, "/ LoRA-16", "paper, GB", *times, "file")
    rows = [
        (
            emphasised(row),
            f"{100 * row.trained_share:.2f} %",
            f"{row.tuning_peak_bytes / 2**30:.2f}",
            _ratio(table.over(row, "lora-16", "tuning_peak_bytes")),
            f"{table.papers[row.method].tuning_gb}" if row.method in table.papers else "",
            _ratio(table.step_over(row, "full")),
            *(_on_card(table, row) if setting.on_gpu else ()),
            _ratio(row.inference_over_plain),
            f"{row.file_bytes / 2**20:.1f} MiB" if row.file_bytes else "",
        )
        for row in table.rows
    ]
    threads = f", {machine['threads']} threads" if machine["threads"] else ""
    together = "" if setting.on_gpu else ",\nin turn with full tuning and with the plain model"
    dtype = setting.dtype if setting.step == EAGER else f"{setting.dtype}, {setting.step}"
    lines = [
        f"{setting.model}, {dtype}; peak of a training step at batch {setting.batch_size}, "
        f"times at batch {setting.step_batch_size} on {machine['processor']}{threads}{together}. "
        f"torch {machine['versions']['torch']}, {date}."
    ]
    lines += [f"{name}: left out, {reason}." for name, reason in table.missing.items()]
    return f"{markdown(titles, rows)}\n\n" + "\n".join(lines)


def _on_card(table: Table7, row: CostRow) -> tuple[str, ...]:
    """The kernels of a step: their time, their number."""
    return (
        f"{row.kernel_ms:.1f}",
        _ratio(table.over(row, "lora-16", "kernel_ms")),
        f"{row.kernels:,}",
        _ratio(table.over(row, "lora-16", "kernels")),
    )


def scores_table(measured: Mapping[str, Any]) -> str:
    """How long the scores of the paper's number of samples take."""
    speed = papers_table(measured)[0].sensitivity
    if speed is None:
        raise ValueError("the cost table has no times of sensitivity: run `make bench`")
    rows = [
        (
            f"{way} (another quantity)" if way == BATCH_SQUARED else way,
            f"{speed.per_second(way):.2f}",
            f"{speed.seconds(PAPER_SAMPLES, way):.0f}",
            f"{speed.ours_over(way):.2f}",
        )
        for way in speed.per_sample
    ]
    rows += [(way, reason, "", "") for way, reason in speed.missing.items()]
    a_second = f"{PAPER_SAMPLES / PAPER_SENSITIVITY_S:.0f}"
    paper = ("the paper, RTX 3090 (another quantity)", a_second, f"{PAPER_SENSITIVITY_S}", "")
    return markdown(
        ("", "samples / s", f"{PAPER_SAMPLES} samples, s", "ours / this"), [*rows, paper]
    )


def papers_table(measured: Mapping[str, Any]) -> tuple[Table7, str]:
    """The newest timed cost table of the paper's model in fp32, and its date.

    Raises:
        ValueError: there is none.
    """
    found = [
        (value["date"], table)
        for value in measured.get(TABLES, {}).values()
        for table in [Table7.from_json(value)]
        if table.papers and table.setting.dtype == "fp32" and table.setting.rounds
    ]
    if not found:
        raise ValueError("the results have no cost table of the paper's model: run `make bench`")
    date, table = max(found, key=lambda pair: pair[0])
    return table, date


def emphasised(row: CostRow) -> str:
    """Its name, ours in bold."""
    return f"**{row.method}**" if row.is_ours else row.method


def _ratio(value: float | None) -> str:
    return "not run" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    results = read(Path(sys.argv[1]))
    for title, value in results[TABLES].items():
        print(f"### {title}\n")
        print(f"{table_markdown(Table7.from_json(value), results['machine'], value['date'])}\n")
