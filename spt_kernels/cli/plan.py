"""`spt-kernels plan`: spend a budget where a measured sensitivity says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import described
from .terminal import Terminal
from .training_options import parse_budget

HELP = """Decide what to train within a budget, and show it.

The paper's Eq. 4 (selection) and Eq. 5 (allocation).

  spt-kernels plan photos.sensitivity --budget 0.4M
  spt-kernels plan photos.sensitivity --structured adapter -o photos.plan
  spt-kernels plan photos.sensitivity --budget 1% --picture photos.png

A plan can be trained with `spt-kernels finetune --plan photos.plan`.
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
    rank: Annotated[int, described("Method", "--rank R", "Of LoRA and Adapter [8].")] = 8,
    rule: Annotated[
        str, described("Method", "--rule NAME", "paper or published-code [paper].")
    ] = "paper",
    output: Annotated[
        Path | None, described("Run", "--output -o FILE", "Where to write it.")
    ] = None,
    picture: Annotated[
        Path | None, described("Run", "--picture FILE", "Draw it, as the paper's Figure 4.")
    ] = None,
) -> None:
    """Allocate, save, draw, show."""
    from ..plan import allocate
    from ..sensitivity import Sensitivity

    share = parse_budget(budget)
    assert share is not None
    kind = None if structured == "none" else structured
    measured = Sensitivity.load(sensitivity)
    made = allocate(measured, share, structured=kind, rank=rank, rule=rule)
    if output is not None:
        made.save(output)
    if picture is not None:
        from ..plan.figure import sensitivity_figure

        sensitivity_figure(made).savefig(picture)
    terminal.show(plan_figures(made), made.summary(terminal.out.width))


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
        "model": plan.model_name,
        "samples": plan.num_samples,
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
