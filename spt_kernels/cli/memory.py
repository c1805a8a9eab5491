"""`spt-kernels memory`: what a training step would need, without running one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .options import ModelOptions, described
from .terminal import Terminal, count, table

if TYPE_CHECKING:
    from ..memory import MemoryEstimate

HELP = """Account for the memory of a training step, without a GPU.

Neither weights nor images are needed.

  spt-kernels memory -m vit_base_patch16_224 --batch-size 64
  spt-kernels memory -m vit_base_patch16_224 --plan photos.plan \\
      --dtype bf16-autocast
"""


def run(
    terminal: Terminal,
    model: ModelOptions,
    plan: Annotated[
        Path | None, described("Run", "--plan", metavar="FILE", help="A row for this plan.")
    ] = None,
    rank: Annotated[
        int, described("Run", "--rank", metavar="R", help="Of the row for LoRA on q and v [16].")
    ] = 16,
    batch_size: Annotated[
        int, described("Run", "--batch-size", metavar="N", help="Images per step [64].")
    ] = 64,
    num_classes: Annotated[
        int, described("Run", "--num-classes", metavar="N", help="Of the head [100].")
    ] = 100,
    dtype: Annotated[
        str, described("Run", "--dtype", metavar="NAME", help="fp32, bf16-autocast or bf16 [fp32].")
    ] = "fp32",
) -> None:
    """Estimate each method and show the peaks side by side."""
    from ..finetuning import methods
    from ..finetuning.models import build, preprocessing_of
    from ..finetuning.recipe import Method
    from ..memory import estimate_memory
    from ..plan import Plan

    source = model.source()
    if source is None:
        raise ValueError("--model: name a timm architecture")
    base = build(source, num_classes).model
    form = preprocessing_of(base)
    shape = (batch_size, len(form.mean), form.size, form.size)
    plans: dict[str, Any] = {
        name: methods.make_plan(base, Method(name, rank=rank if name == "lora" else None))
        for name in ("full", "bias", "lora", "linear")
    }
    plans[f"lora-{rank}"] = plans.pop("lora")
    if plan is not None:
        plans["the plan"] = Plan.load(plan)
    with terminal.progress() as progress:
        progress.start("estimating", len(plans))
        estimates = {}
        for name, made in plans.items():
            method = "full" if made is None else None
            estimates[name] = estimate_memory(base, shape, made, method=method, dtype=dtype)
            progress.advance(1, name)
    value = {
        "batch_shape": list(shape),
        "dtype": dtype,
        "accounted": {
            name: {"peak_bytes": e.peak_bytes, "num_trainable": e.num_trainable, **e.by_category}
            for name, e in estimates.items()
        },
    }
    terminal.show(value, _table(estimates, shape, dtype))


def _table(estimates: dict[str, MemoryEstimate], shape: tuple[int, ...], dtype: str) -> Any:
    categories = ("weights", "optimizer", "gradients", "activations", "temporary")
    rows = [
        (
            name,
            count(estimate.num_trainable),
            *(_mebibytes(estimate.by_category[category]) for category in categories),
            _mebibytes(estimate.peak_bytes),
        )
        for name, estimate in estimates.items()
    ]
    batch = " × ".join(map(str, shape))
    title = f"Peak of a training step in MiB, accounted: batch {batch}, {dtype}"
    short = ("weights", "optim.", "gradients", "activ.", "temp.")
    return table(("method", "trained", *short, "peak"), rows, title)


def _mebibytes(number: int) -> str:
    return f"{number / 2**20:,.1f}"
