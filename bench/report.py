"""Writes tables and drawings from committed results, so that no figure is ever typed in.

`make report` rewrites what stands between markers in README.md, bench/ROOFLINE.md and docs/PEERS.md
and draws docs/bench/*.png; `python -m bench.report --check` fails when a text is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spt_kernels.cli.demo import cells
from spt_kernels.costs.drawing import cost_figure
from spt_kernels.costs.results import TABLES, read
from spt_kernels.files.picture import save_picture
from spt_kernels.finetuning.demo import DemoResult

from . import measured_report, results, roofline_gpu
from .contest import shown
from .cost_report import cost_table, papers_table, scores_table
from .drawings import growth_figure, growth_points
from .markdown import markdown
from .memory_report import memory_table, target_table

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "docs" / "demo" / "result.json"
DRAWINGS = ROOT / "docs" / "bench"
# what a reader of README.md compares first; docs/PEERS.md has all
FIRST = frozenset(
    {"full", "linear", "bias", "prompt-deep", "adapter-8", "lora-16", "adaptformer"}
    | {"spt-lora-structured", "spt-lora", "spt-adapter", "spt-unstructured"}
    | {"dense-gradient", "published-layer"}
    | {"peft-lora-16", "peft-lora-all", "peft-shira", "peft-super-tuning"}
)
TEXTS = (ROOT / "README.md", ROOT / "bench" / "ROOFLINE.md", ROOT / "docs" / "PEERS.md")


def demo_table(result: Mapping[str, Any]) -> str:
    """The demo's rows as a Markdown table, with what became of the task file below."""
    demo = DemoResult.from_json(result)
    titles, *rows = cells(demo)
    check, seeds = demo.check, len(demo.rows[0].accuracies)
    layers = "the plain model's" if check.has_plain_layers else "not the plain model's"
    same = f"{check.same_after_loading} of {check.images} predictions as before"
    return (
        f"{markdown([title.replace('*', '') for title in titles], rows)}\n\n"
        f"Mean ± standard deviation of {seeds} seeds on {check.images} unseen images. The head "
        "is trained in every row and not counted.\n"
        "Peak memory is of a training step, accounted, not measured; the file of `full` is the "
        "whole model. Loaded\nonto a fresh base model, the task file gives "
        f"{same}; merged, {check.same_after_merging}, and the\nlayers are {layers}."
    )


def machine_line(measured: Mapping[str, Any]) -> str:
    """Which machine, at which speed, with which versions."""
    machine, speed = measured["machine"], measured["speed"]
    threads = f", {machine['threads']} threads" if machine["threads"] else ""
    code = f", {machine['instruction_set']} code" if machine["instruction_set"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    dates = sorted({contest["date"] for contest in measured["contests"].values()})
    return (
        f"**{machine['processor']}**{threads}{code}: reads {speed['bytes_per_s'] / 1e9:.0f} GB/s, "
        f"multiplies fp32 matrices at {speed['flops_per_s'] / 1e9:.0f} GFLOP/s. "
        f"{versions}; {dates[0]}{'' if dates[0] == dates[-1] else ' to ' + dates[-1]}."
    )


def bench_table(contests: Iterable[Mapping[str, Any]]) -> str:
    """Ours beside each contestant: median, spread, floor, ratio and target."""
    titles = ("", "ms", "min to max", "ours / this", "target")
    rows: list[Sequence[str]] = []
    for contest in contests:
        rows.append((f"**{contest['title']}**", "", "", "", ""))
        rows += [_row_cells(row) for row in contest["rows"]]
        if contest["floor_ms"]:
            over = contest["rows"][0]["median_ms"] / contest["floor_ms"]
            rows.append(("*floor of ours*", f"{contest['floor_ms']:.2f}", "", f"{over:.1f}", ""))
        rows += [
            (f"*{name}: {shown(value)}*", "", "", "", "")
            for name, value in contest["facts"].items()
        ]
    return markdown(titles, rows)


def _row_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    target = row["target"]
    missed = target is not None and row["ours_over_this"] > target
    return (
        row["name"],
        f"{row['median_ms']:.2f}",
        f"{row['min_ms']:.2f} to {row['max_ms']:.2f}",
        f"{row['ours_over_this']:.3f}",
        "" if target is None else f"{target:.3f}{', missed' if missed else ''}",
    )


def newest_cpu_results(part: str, folder: Path = results.FOLDER) -> dict[str, Any]:
    """The results of one machine, the CPU that has the newest of a part: `tables` or `contests`."""
    # of one day the later version's
    found = [read(path) for path in sorted(folder.glob("*.json"), reverse=True)]
    found = [
        measured for measured in found if measured["machine"]["threads"] and measured.get(part)
    ]
    if not found:
        raise FileNotFoundError(f"{folder} has no {part} of a CPU: run `make bench`")
    return max(found, key=lambda own: max(entry["date"] for entry in own[part].values()))


def parts(costs: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Callable[[], str]]:
    """Marker -> what stands between `<!-- marker:begin -->` and `<!-- marker:end -->`.

    Args:
        costs: results with cost tables.
        measured: results with contests, of whatever machine.
    """
    tables = {"demo": lambda: demo_table(json.loads(DEMO.read_text()))}
    tables["costs"] = lambda: cost_table(costs, FIRST)
    tables["every_cost"] = lambda: cost_table(costs)
    tables["peaks"] = lambda: memory_table(costs)
    tables["targets"] = lambda: target_table(costs)
    tables["scores"] = lambda: scores_table(costs)
    tables["machine"] = lambda: machine_line(measured)
    tables["cards"] = roofline_gpu.report
    tables["measured"] = measured_report.section
    contests = [contest for contest in measured["contests"].values() if not contest["axis"]]
    for bench in dict.fromkeys(contest["bench"] for contest in contests):
        chosen = [contest for contest in contests if contest["bench"] == bench]
        tables[bench] = lambda chosen=chosen: bench_table(chosen)  # type: ignore[misc]
    return tables


def rendered(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """The text with its generated parts made anew.

    Raises:
        ValueError: it has a marker that no result belongs to.
    """

    def part(match: re.Match[str]) -> str:
        name = match[1]
        if name not in tables:
            raise ValueError(f"no results for the marker {name!r}: known are {', '.join(tables)}")
        return f"<!-- {name}:begin -->\n{tables[name]()}\n<!-- {name}:end -->"

    return re.sub(r"<!-- (\w+):begin -->\n.*?<!-- \1:end -->", part, text, flags=re.DOTALL)


def main() -> int:
    """Write texts and drawings, or with `--check` only compare the texts."""
    costs, measured = newest_cpu_results(TABLES), newest_cpu_results("contests")
    tables = parts(costs, measured)
    if "--check" in sys.argv:
        return int(any(text.read_text() != rendered(text.read_text(), tables) for text in TEXTS))
    for text in TEXTS:
        text.write_text(rendered(text.read_text(), tables))
    DRAWINGS.mkdir(parents=True, exist_ok=True)
    save_picture(cost_figure(papers_table(costs)[0]), DRAWINGS / "table7.png")
    if growth_points(measured):
        save_picture(growth_figure(measured), DRAWINGS / "growth.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
