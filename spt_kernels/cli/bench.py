"""`spt-kernels bench`: the paper's cost table, measured again on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import MachineOptions, ModelOptions, described, split_names
from .terminal import Terminal, percent, size, table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..costs import PaperRow, Table7

HELP = """Measure what each way of fine-tuning costs: Table 7 of the paper, here.

Neither weights nor images are needed. Without a GPU, memory is accounted
at --batch-size and times are taken at --timed-batch-size.

  spt-kernels bench table7
  spt-kernels bench table7 --ways full,lora-16,spt-lora -o costs
  spt-kernels bench table7 -m swin_base_patch4_window7_224 --dtype bf16
"""

TABLES = ("table7",)


def run(
    terminal: Terminal,
    model: ModelOptions,
    machine: MachineOptions,
    what: Annotated[str, typer.Argument(help="table7.", metavar="TABLE")] = "table7",
    ways: Annotated[
        str | None, described("Run", "--ways", metavar="A,B,…", help="These rows alone [all].")
    ] = None,
    batch_size: Annotated[
        int, described("Run", "--batch-size", metavar="N", help="Images per step [64].")
    ] = 64,
    timed_batch_size: Annotated[
        int,
        described("Run", "--timed-batch-size", metavar="N", help="For times on a CPU [8]."),
    ] = 8,
    num_classes: Annotated[
        int, described("Run", "--num-classes", metavar="N", help="Of the head [100].")
    ] = 100,
    dtype: Annotated[
        str, described("Run", "--dtype", metavar="NAME", help="fp32, bf16-autocast or bf16 [fp32].")
    ] = "fp32",
    rounds: Annotated[
        int, described("Run", "--rounds", metavar="N", help="Timed runs of everything [5].")
    ] = 5,
    output: Annotated[
        Path | None,
        described("Output", "--output", "-o", metavar="FOLDER", help="For table7.json and .png."),
    ] = None,
) -> None:
    """Measure the rows and show them beside the paper's."""
    from ..costs import PAPER_MODEL, WAYS, CostSetting, run_table7
    from ..costs.drawing import cost_figure
    from ..finetuning.device import pick_device
    from ..finetuning.models import ModelSource

    if what not in TABLES:
        raise ValueError(f"expected one of {', '.join(TABLES)}, got {what!r}")
    source = model.source() or ModelSource(PAPER_MODEL)
    chosen = split_names(ways) or tuple(WAYS)
    setting = CostSetting(
        model=source.name,
        model_args=source.args,
        batch_size=batch_size,
        timed_batch_size=timed_batch_size,
        num_classes=num_classes,
        dtype=dtype,
        device=str(pick_device(machine.device)),
        rounds=rounds,
    )
    with terminal.progress() as progress:
        progress.start("measuring", len(chosen) + 1)
        result = run_table7(setting, chosen, told=lambda way: progress.advance(1, way))
    value = result.to_json()
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "table7.json").write_text(json.dumps(value, indent=1) + "\n")
        cost_figure(result).savefig(output / "table7.png")
    terminal.show(value, _training_table(result), "", _inference_table(result), "", *_below(result))


def _training_table(result: Table7) -> Any:
    setting = result.setting
    how = "measured" if setting.on_gpu else "accounted"
    batch = setting.batch_size if setting.on_gpu else setting.timed_batch_size
    title = (
        f"Training {setting.model}, {setting.dtype}: peak {how} at batch {setting.batch_size}, "
        f"time on {setting.device} at batch {batch}"
    )
    papers = _papers(result)
    rows = [
        (
            row.way,
            percent(row.trained_share, 2),
            _gib(row.tuning_peak_bytes),
            _ratio(result.over(row, "full", "tuning_peak_bytes")),
            _ratio(result.over(row, "lora-16", "tuning_peak_bytes")),
            str(papers[row.way].tuning_gb) if row.way in papers else "",
            "–" if row.step is None else f"{row.step.median_ms / 1e3:.2f}",
            _ratio(result.step_over(row, "full")),
            _ratio(result.step_over(row, "lora-16")),
        )
        for row in result.rows
    ]
    peak, step = ("GiB", "/ full", "/ lora", "paper"), ("step, s", "/ full", "/ lora")
    return table(("way", "trained", *peak, *step), rows, title, is_wide=True)


def _inference_table(result: Table7) -> Any:
    papers = _papers(result)
    rows = [
        (
            row.way,
            "–" if row.inference is None else f"{row.inference.median_ms:.1f}",
            _ratio(row.inference_over_plain),
            str(papers[row.way].inference_ms) if row.way in papers else "",
            _gib(row.inference_peak_bytes),
            str(papers[row.way].inference_gb) if row.way in papers else "",
            size(row.file_bytes) if row.file_bytes else "–",
        )
        for row in result.rows
    ]
    names = ("way", "ms / image", "/ plain", "paper", "GiB", "paper", "file")
    return table(names, rows, "Inference, merged where it can be, and what is handed over")


def _papers(result: Table7) -> Mapping[str, PaperRow]:
    from ..costs import PAPER_MODEL, PAPER_ROWS

    return PAPER_ROWS if result.setting.model == PAPER_MODEL else {}


def _gib(number: int) -> str:
    return f"{number / 2**30:.2f}" if number else "–"


def _ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def _below(result: Table7) -> list[str]:
    lines = [f"{row.way}: {row.note}" for row in result.rows if row.note]
    lines += [f"{way}: left out, {reason}" for way, reason in result.missing.items()]
    speed = result.sensitivity
    if speed is not None:
        lines += [
            f"sensitivity: {speed.exact:.2f} samples per second in batches of {speed.batch_size}, "
            f"400 in {400 / speed.exact:,.0f} s",
            f"  {speed.loop:.2f} with a batch of one, which gives the same numbers",
            f"  {speed.batch_squared:.2f} squaring batch gradients, which is another quantity",
        ]
    return lines
