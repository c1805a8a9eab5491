"""What a training step launches and moves on a card, accounted: each method beside PEFT's LoRA-16.

`python -m bench.step_account [--model NAME] [--dtype DTYPE ...] [--batch N] [--markdown] [method
...]`

The step is rehearsed on fake tensors, as for `estimate_memory`: every call of an operator is one
kernel, or two where a kernel of ours adds up what another has left. Times are those of a model
(`spt_kernels.fitting.card`), which gave an H100's kernel times within 4 %; they are no
measurements. Not counted: what a library makes several kernels of.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import nn

from spt_kernels.costs import CostSetting
from spt_kernels.fitting.card import card_named
from spt_kernels.memory.rehearsal import Rehearsal

from .markdown import markdown

RIVAL = "peft-lora-16"
METHODS = (RIVAL, "full", "lora-16", "spt-lora", "spt-unstructured")
DTYPES = ("bf16-autocast", "fp32", "bf16")
BUDGET = 590_000  # as LoRA-16 trains on q, k and v
CARD = "H100"
TITLES = ("", "launches", "GB moved", f"ms of kernels, {CARD}, by a model", "peak, GiB")


@dataclass(frozen=True)
class StepAccount:
    """What one step takes.

    Attributes:
        launches: kernels.
        moved_gb: that they read and write, GB.
        kernel_ms: on the card, one after the other.
        peak_gib: of memory.
    """

    launches: int
    moved_gb: float
    kernel_ms: float
    peak_gib: float

    def beside(self, rival: StepAccount) -> tuple[str, ...]:
        """Each figure and its ratio to that of another step."""
        pairs = (
            (f"{self.launches}", self.launches / rival.launches),
            (f"{self.moved_gb:.1f}", self.moved_gb / rival.moved_gb),
            (f"{self.kernel_ms:.1f}", self.kernel_ms / rival.kernel_ms),
            (f"{self.peak_gib:.2f}", self.peak_gib / rival.peak_gib),
        )
        return tuple(f"{shown} ({ratio:.2f})" for shown, ratio in pairs)


def account(
    model: nn.Module, shape: Sequence[int], method: str, dtype: str, budget: int = BUDGET
) -> StepAccount:
    """Account for a step of a plain model, in the midst of training.

    Args:
        model: of images, is not changed.
        shape: of a batch of them.
        method: of `spt_kernels.methods`.
        dtype: of `estimate_memory`.
        budget: of a method that has one.
    """
    budgeted = budget if method.startswith("spt-") else None
    rehearsal = Rehearsal(model, method=method, budget=budgeted, dtype=dtype, image_shape=shape[1:])
    estimate, work = rehearsal.with_work(shape)
    seconds = card_named(CARD).seconds_of(work, captured=True)
    return StepAccount(
        work.launches, work.moved_bytes / 1e9, 1e3 * seconds, estimate.peak_bytes / 2**30
    )


def accounts(
    setting: CostSetting, methods: Sequence[str], dtypes: Sequence[str]
) -> Iterator[tuple[str, str, StepAccount]]:
    """Method, dtype and account of each, by dtype."""
    model = setting.build()
    shape = (setting.batch_size, *setting.image_shape(model))
    for dtype in dtypes:
        for method in methods:
            yield method, dtype, account(model, shape, method, dtype)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each dtype; ratios are to its first method."""
    parser = argparse.ArgumentParser(prog="python -m bench.step_account", description=__doc__)
    parser.add_argument("method", nargs="*", default=METHODS)
    parser.add_argument("--model", default=CostSetting.model)
    parser.add_argument("--model-args", type=json.loads, default={}, help="JSON")
    parser.add_argument("--dtype", nargs="*", default=DTYPES, choices=DTYPES)
    parser.add_argument("--batch", type=int, default=CostSetting.batch_size)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)
    setting = CostSetting(options.model, options.model_args, options.batch)
    found = list(accounts(setting, options.method, options.dtype))
    console = Console()
    for dtype in options.dtype:
        of_dtype = {method: one for method, own, one in found if own == dtype}
        rival = next(iter(of_dtype.values()))
        rows = [(method, *one.beside(rival)) for method, one in of_dtype.items()]
        title = f"{setting.model_title()}, {dtype}, batch {options.batch}"
        if options.markdown:
            print(f"{markdown((title, *TITLES[1:]), rows)}\n")
            continue
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for n, name in enumerate(TITLES):
            table.add_column(name, justify="right" if n else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    main()
