"""`spt-kernels bench`: the paper's cost table, measured again on this machine, and comparisons."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import ModelOptions, SizeOptions, described, split_names
from .terminal import Terminal, percent, size, table

if TYPE_CHECKING:
    from ..costs import SensitivitySpeed, Table7

HELP = """Measure what each method of fine-tuning costs: Table 7 of the paper, here.

Neither weights nor images are needed, and none are read. Without a GPU,
memory is accounted as one would need it at --batch-size, and times are
taken on the CPU at --timed-batch-size. Rows of other libraries (PEFT's
LoRA, SHiRA, Super-Tuning) come where they are installed.

  spt-kernels bench table7
  spt-kernels bench table7 --methods full,lora-16,spt-lora -o costs
  spt-kernels bench table7 -m swin_base_patch4_window7_224 --dtype bf16
  spt-kernels bench table7 --rounds 0            (memory alone: quick)
  spt-kernels bench --compare old.json new.json  (fails where slower)
"""

TABLES = ("table7",)
GOT_WORSE = 1  # exit code of a comparison


def run(
    terminal: Terminal,
    model: ModelOptions,
    step: SizeOptions,
    what: Annotated[str, typer.Argument(help="table7.", metavar="TABLE")] = "table7",
    methods: Annotated[
        str | None, described("Run", "--methods --ways A,B,…", "These rows alone [all].")
    ] = None,
    timed_batch_size: Annotated[
        int, described("Run", "--timed-batch-size N", "For times on a CPU [4].")
    ] = 4,
    device: Annotated[
        str, described("Run", "--device NAME", "auto, cpu, cuda or cuda:N [auto].")
    ] = "auto",
    rounds: Annotated[
        int, described("Run", "--rounds N", "Timed runs of each; 0: memory alone [5].")
    ] = 5,
    output: Annotated[
        Path | None, described("Output", "--output -o FOLDER", "For results and picture.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        described("Output", "--compare OLD NEW", "Two results files; no run."),
    ] = None,
) -> int:
    """Measure the rows and show them beside the paper's, or compare two results."""
    from ..costs import PAPER_MODEL, ROWS, CostSetting, run_table7
    from ..costs.results import add_table
    from ..finetuning.device import pick_device
    from ..finetuning.models import ModelSource

    if compare is not None:
        return _compare(terminal, *compare)
    if what not in TABLES:
        raise ValueError(f"TABLE: expected one of {', '.join(TABLES)}, got {what!r}")
    if output is not None and output.exists() and not output.is_dir():
        raise ValueError(f"--output: expected a folder, got the file {output}")
    source = model.source() or ModelSource(PAPER_MODEL)
    chosen = tuple(dict.fromkeys(split_names(methods))) or ROWS
    setting = CostSetting(
        model=source.name,
        model_args=source.args,
        batch_size=step.batch_size,
        timed_batch_size=timed_batch_size,
        num_classes=step.num_classes,
        dtype=step.dtype,
        device=str(pick_device(device)),
        rounds=rounds,
        image_size=step.image_size,
    )
    with terminal.progress() as progress:
        progress.start("measuring", len(chosen) + (rounds > 0 and step.dtype == "fp32"))
        result = run_table7(
            setting,
            chosen,
            told=lambda name: progress.advance(1, name),
            kept=lambda table: None if output is None else add_table(output, table),
        )
    if not result.rows:
        raise ValueError(f"no row could be measured: {'; '.join(_notes(result))}")
    _show(terminal, result, output)
    return 0


def _show(terminal: Terminal, result: Table7, output: Path | None) -> None:
    import torch

    from ..costs.drawing import cost_figure
    from ..costs.machine import describe
    from ..costs.results import add_table

    machine = describe(torch.device(result.setting.device))
    written = []
    if output is not None:
        written.append(add_table(output, result))
        name = "-".join(re.findall(r"[a-z0-9_.]+", result.setting.title()))
        written.append(output / f"table7-{name}.png")
        cost_figure(result).savefig(written[-1])
    terminal.show(
        {"machine": asdict(machine), **result.to_json()},
        _training_table(result),
        "",
        _inference_table(result),
        "",
        *([_speed_table(result.sensitivity), ""] if result.sensitivity else []),
        *_notes(result),
        *(f"written to {path}" for path in written),
    )


def _compare(terminal: Terminal, old: Path, new: Path) -> int:
    from ..costs import compare, results

    changes = compare.compare(results.read(old), results.read(new))
    if not changes:
        raise ValueError(f"--compare: {old} and {new} have no figure in common")
    worse = sum(change.is_regression for change in changes)
    rows = [
        (
            change.name,
            f"{change.before:,.4g}",
            f"{change.after:,.4g}",
            f"{change.after / change.before - 1:+.1%}",
            f"{change.noise:.1%}",
            "worse" if change.is_regression else "",
        )
        for change in changes
    ]
    columns = ("the less the better", "before", "after", "change", "noise", "")
    terminal.show(
        {"changes": [asdict(c) | {"is_regression": c.is_regression} for c in changes]},
        table(columns, rows),
        "",
        f"{len(changes)} figures compared, {worse} worse beyond the noise",
    )
    return GOT_WORSE if worse else 0


def _training_table(result: Table7) -> Any:
    from ..costs.drawing import unit_of

    setting, papers = result.setting, result.papers
    how = "measured" if setting.on_gpu else "accounted"
    title = f"Training {setting.model_title()}, {setting.dtype}: peak {how}"
    title += f" at batch {setting.batch_size}"
    if setting.rounds:
        title += f", time on {setting.device} at batch {setting.step_batch_size}"
    unit = unit_of([row.tuning_peak_bytes for row in result.rows])
    rows = [
        (
            row.method,
            percent(row.trained_share, 2),
            _in_unit(row.tuning_peak_bytes, unit),
            _ratio(result.over(row, "full", "tuning_peak_bytes")),
            _ratio(result.over(row, "lora-16", "tuning_peak_bytes")),
            str(papers[row.method].tuning_gb) if row.method in papers else "",
            "–" if row.step is None else f"{row.step.median_ms / 1e3:.2f}",
            _ratio(result.step_over(row, "full")),
            _ratio(result.step_over(row, "lora-16")),
        )
        for row in result.rows
    ]
    peak, step = (unit, "/ full", "/ lora-16", "paper"), ("step, s", "/ full", "/ lora-16")
    return table(("method", "trained", *peak, *step), rows, title, is_wide=True)


def _inference_table(result: Table7) -> Any:
    from ..costs import PAPER_SAMPLES
    from ..costs.drawing import unit_of

    papers, speed = result.papers, result.sensitivity
    unit = unit_of([row.inference_peak_bytes for row in result.rows])
    rows = [
        (
            row.method,
            "–" if row.inference is None else f"{row.inference.median_ms:.1f}",
            _ratio(row.inference_over_plain),
            str(papers[row.method].inference_ms) if row.method in papers else "",
            _in_unit(row.inference_peak_bytes, unit),
            str(papers[row.method].inference_gb) if row.method in papers else "",
            f"{speed.seconds(PAPER_SAMPLES):,.1f}" if speed and row.is_ours else "",
            size(row.file_bytes) if row.file_bytes else "–",
        )
        for row in result.rows
    ]
    names = ("method", "ms/image", "/ plain", "paper", unit, "paper", "scores, s", "file")
    return table(names, rows, "Inference, merged where it can be; scores; the file", is_wide=True)


def _in_unit(number: int, unit: str) -> str:
    from ..costs.drawing import UNITS

    return f"{number / UNITS[unit]:,.2f}" if number else "–"


def _ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def _notes(result: Table7) -> list[str]:
    spreads = [s for row in result.rows for s in (row.step, row.inference) if s is not None]
    lines = []
    if spreads:
        rounds, noise = result.setting.rounds, percent(max(spread.noise for spread in spreads))
        several = f"times are medians of {rounds}, their spread at most ± {noise}"
        lines.append(several if rounds > 1 else "times are of one run: their spread is not known")
    both = [row for row in result.rows if result.setting.on_gpu and row.tuning_peak_bytes]
    if both:
        ratios = [row.accounted_peak_bytes / row.tuning_peak_bytes for row in both]
        lines.append(f"accounted over measured peaks: {min(ratios):.2f} to {max(ratios):.2f}")
    lines += [f"{row.method}: {row.note}" for row in result.rows if row.note]
    return lines + [f"{name}: left out, {reason}" for name, reason in result.missing.items()]


def _speed_table(speed: SensitivitySpeed) -> Any:
    from ..costs import PAPER_SAMPLES, PAPER_SENSITIVITY_S
    from ..costs.sensitivity_speed import BATCH_SQUARED

    rows = [
        (
            f"{way} *" if way == BATCH_SQUARED else way,
            f"{speed.per_second(way):,.2f}",
            f"{speed.seconds(PAPER_SAMPLES, way):,.1f}",
            f"{speed.ours_over(way):.2f}",
        )
        for way in speed.per_sample
    ]
    rows += [(way, reason, "–", "–") for way, reason in speed.missing.items()]
    per_s = PAPER_SAMPLES / PAPER_SENSITIVITY_S
    rows.append(("the paper, on a GPU *", f"{per_s:,.2f}", f"{PAPER_SENSITIVITY_S:,.1f}", ""))
    columns = ("* another quantity", "samples / s", f"{PAPER_SAMPLES} in s", "ours / this")
    title = f"Sensitivity of every candidate parameter, fp32, in batches of {speed.batch_size}"
    return table(columns, rows, title)
