"""`spt-kernels bench`: the paper's cost table on this machine, comparisons, a card's rates."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .bench_tables import cost_parts, notes
from .bench_tune import tune
from .command import named_of
from .options import ArchitectureOptions, SizeOptions, described, split_names
from .terminal import Terminal, table
from .written import check_folder

if TYPE_CHECKING:
    from ..costs import CostSetting

HELP = """Measure what each method of fine-tuning costs: Table 7 of the paper, here.

Neither weights nor images are needed, and none are read. Without a GPU,
memory is accounted as one would need it at --batch-size, and times are
taken on the CPU at --timed-batch-size. Rows of other libraries (PEFT's
LoRA, SHiRA, Super-Tuning) come where they are installed.

  spt-kernels bench table7
  spt-kernels bench table7 --methods full,lora-16,spt-lora -o costs
  spt-kernels bench table7 -m swin_base_patch4_window7_224 --dtype bf16
  spt-kernels bench table7 --rounds 0            (memory alone: quick)
  spt-kernels bench table7 --step compiled       (or, on a GPU, captured)
  spt-kernels bench --compare old.json new.json  (fails where slower)

On a GPU a table also says how many kernels a step launches and how long
they take together. Which kernel a sparse weight gradient takes there is
chosen by rates; those of your own card are measured and stored by

  spt-kernels bench tune

in ~/.config/spt_kernels/rates.json, or the file that SPT_KERNELS_RATES
names; empty, it leaves the shipped rates.
"""

TABLE, TUNE = "table7", "tune"
OF_TUNE = {"what", "device", "as_json", "quiet", "debug"}
OF_COMPARE = {"compare", "what", "as_json", "quiet", "debug"}
GOT_WORSE = 1  # exit code of a comparison


def run(
    context: typer.Context,
    terminal: Terminal,
    model: ArchitectureOptions,
    size: SizeOptions,
    what: Annotated[str, typer.Argument(help="table7 or tune.", metavar="WHAT")] = TABLE,
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
    step: Annotated[
        str, described("Run", "--step HOW", "eager, compiled, or captured on a GPU [eager].")
    ] = "eager",
    output: Annotated[
        Path | None, described("Output", "--output -o FOLDER", "For results and picture.")
    ] = None,
    resume: Annotated[
        bool,
        described("Output", "--resume", "Keep rows that this commit has in --output already."),
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        described("Output", "--compare OLD NEW", "Two results files; no run."),
    ] = None,
) -> int:
    """Measure the rows and show them beside the paper's, or compare two results, or tune."""
    if compare is not None:
        for name in named_of(context, context.params.keys() - OF_COMPARE):
            raise ValueError(f"--{name.replace('_', '-')}: goes with {TABLE}, not with --compare")
        return _compare(terminal, *compare)
    if what == TUNE:
        for name in named_of(context, context.params.keys() - OF_TUNE):
            raise ValueError(f"--{name.replace('_', '-')}: goes with {TABLE}, not with {TUNE}")
        return tune(terminal, device)
    if what != TABLE:
        raise ValueError(f"WHAT: expected {TABLE} or {TUNE}, got {what!r}")
    if output is not None:
        check_folder("--output", output)
    if resume and output is None:
        raise ValueError("--resume: name the folder with --output")
    from ..costs import PAPER_MODEL, CostSetting
    from ..finetuning.base.models import ModelSource
    from ..finetuning.device import pick_device

    source = model.source() or ModelSource(PAPER_MODEL)
    setting = CostSetting(
        model=source.name,
        model_args=source.args,
        batch_size=size.batch_size,
        timed_batch_size=timed_batch_size,
        num_classes=size.num_classes,
        dtype=size.dtype,
        device=str(pick_device(device)),
        rounds=rounds,
        image_size=size.image_size,
        step=step,
    )
    _measure(terminal, setting, split_names(methods, "--methods"), output, resume)
    return 0


def _measure(
    terminal: Terminal,
    setting: CostSetting,
    methods: tuple[str, ...],
    output: Path | None,
    resume: bool,
) -> None:
    import torch

    from ..costs import ROWS, run_table7
    from ..costs.drawing import cost_figure
    from ..costs.machine import describe
    from ..costs.results import add_table, known_table
    from ..files.picture import check_can_draw, save_picture

    if output is not None:
        check_can_draw()
    known = known_table(output, setting) if output is not None and resume else None
    chosen = tuple(dict.fromkeys(methods)) or ROWS
    with terminal.progress() as progress:
        progress.start("measuring", len(chosen) + setting.has_scores)
        result = run_table7(
            setting,
            chosen,
            known=known,
            told=lambda name: progress.advance(1, name),
            kept=lambda table: None if output is None else add_table(output, table),
        )
    if not result.rows:
        raise ValueError(f"no row could be measured: {'; '.join(notes(result))}")
    written = []
    if output is not None:
        written.append(add_table(output, result))
        name = "-".join(re.findall(r"[a-z0-9_.]+", setting.title()))
        written.append(output / f"table7-{name}.png")
        save_picture(cost_figure(result), written[-1])
    terminal.show(
        {"machine": asdict(describe(torch.device(setting.device))), **result.to_json()},
        *cost_parts(result),
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
