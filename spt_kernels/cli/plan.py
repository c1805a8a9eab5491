"""`spt-kernels plan`: spend a budget where a measured sensitivity says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..files.picture import save_picture
from .options import described
from .terminal import Terminal
from .training_options import FROM_BLOCK_HELP, parse_block, parse_budget
from .written import check_apart, check_file, check_picture

KINDS = {"lora": "lora", "adapter": "adapter", "none": None}

HELP = """Decide what to train within a budget, and show it.

The paper's Eq. 4 (selection) and Eq. 5 (allocation).

  spt-kernels plan photos.sensitivity --budget 0.4M
  spt-kernels plan photos.sensitivity --structured adapter -o photos.plan
  spt-kernels plan photos.sensitivity --budget 1% --picture photos.png
  spt-kernels plan photos.sensitivity --from-block 6

A plan can be trained with `spt-kernels finetune --plan photos.plan`, and its
step accounted for with `spt-kernels memory --plan photos.plan`.
"""


def run(
    terminal: Terminal,
    sensitivity: Annotated[
        Path, typer.Argument(help="What `spt-kernels sensitivity` wrote.", metavar="FILE")
    ],
    budget: Annotated[
        str,
        described(
            "Method",
            "--budget -b N",
            "400000, 0.4M, or a share of the backbone, 0.005 or 0.5% [0.5%].",
        ),
    ] = "0.5%",
    structured: Annotated[
        str, described("Method", "--structured KIND", "lora, adapter or none [lora].")
    ] = "lora",
    rank: Annotated[int | None, described("Method", "--rank R", "Of LoRA and Adapter [8].")] = None,
    rule: Annotated[
        str, described("Method", "--rule NAME", "paper or published-code [paper].")
    ] = "paper",
    from_block: Annotated[
        str | None, described("Method", "--from-block B", FROM_BLOCK_HELP)
    ] = None,
    output: Annotated[
        Path | None, described("Run", "--output -o FILE", "Where to write it.")
    ] = None,
    picture: Annotated[
        Path | None, described("Run", "--picture FILE", "Draw it, as the paper's Figure 4.")
    ] = None,
    force: Annotated[bool, described("Run", "--force", "Overwrite such files.")] = False,
) -> None:
    """Allocate, save, draw, show."""
    if structured not in KINDS:
        raise ValueError(f"--structured: expected one of {', '.join(KINDS)}, got {structured!r}")
    kind = KINDS[structured]
    if kind is None and rank is not None:
        raise ValueError("--rank: --structured none puts no module anywhere; leave it out")
    share = parse_budget(budget)
    assert share is not None
    from ..methods import DEFAULT_RANK, Method

    rank = DEFAULT_RANK if rank is None else rank
    Method(budget=share, rank=rank, rule=rule)  # or refuses
    check_apart(sensitivity=sensitivity, output=output, picture=picture)
    check_file("--output", output, force=force)
    check_picture("--picture", picture, force=force)
    from ..finetuning.job.given_plan import load_sensitivity
    from ..plan import allocate

    measured = load_sensitivity(sensitivity)
    block = parse_block(from_block)
    made = allocate(measured, share, structured=kind, rank=rank, rule=rule, from_block=block)
    if output is not None:
        made.save(output)
    if picture is not None:
        from ..plan.figure import sensitivity_figure

        save_picture(sensitivity_figure(made), picture)
    written = [str(path) for path in (output, picture) if path is not None]
    parts = [made.summary(terminal.out.width), *(f"written to {path}" for path in written)]
    terminal.show({**plan_figures(made), "written": written}, *parts)


def plan_figures(plan: Any) -> dict[str, Any]:
    """A `Plan` as JSON values, without its positions."""
    return {
        "trained_parameters": plan.num_trainable,
        "unstructured_parameters": plan.num_unstructured,
        "structured_parameters": plan.num_structured,
        "budget": plan.budget,
        "backbone_parameters": plan.backbone_numel,
        "structured": plan.kind,
        "rank": plan.rank,
        "rule": plan.rule,
        "from_block": plan.from_block or None,
        "forgone": plan.forgone,
        "model": plan.model_name,
        "samples": plan.num_samples,
        "head": list(plan.head),
        "head_source": plan.head_source,
        "cells": [
            {
                "block": block,
                "operation": operation,
                "parameters": cell.numel,
                "selected": cell.selected,
                "unstructured": cell.unstructured,
                "structured": cell.structured,
            }
            for (block, operation), cell in plan.cells().items()
        ],
    }
