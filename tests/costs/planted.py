"""A clock that tells what a card of planted rates would take, and runs nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from spt_kernels.costs import way_times
from spt_kernels.gradient_ways.gradient_cost import RATES, CardRates

CPU = torch.device("cpu")
TOKENS = 3
PLANTED = RATES[90]
PRODUCT_PS = {torch.bfloat16: 8.0, torch.float32: 120.0}


def planted_clock(rates: CardRates) -> Callable[[Any], float]:
    """Tells the microseconds of a call that runs nothing, as a card of these rates would."""

    def clock(run: partial[Any]) -> float:
        grad_output, inputs = run.args[:2]
        rows, columns, dtype = grad_output.shape[-1], inputs.shape[-1], inputs.dtype
        of = rates.fp32 if dtype == torch.float32 else rates.narrow
        if run.func is way_times.by_vectors:
            cost = of.gathered * len(run.args[2])
        elif run.func is way_times.by_dense:
            cost = rows * columns + of.called
        elif run.func is way_times.by_tiles:
            plan = run.args[2]
            listed = plan.lists is not None
            sides = [side for side in (plan.rows, plan.columns) if side.dim() == 1]
            copied = (rows if plan.lists_rows else columns) if listed else 0
            cost = max(of.tiled * plan.numel, of.staged * plan.staged)
            cost += of.selected * sum(map(len, sides)) + of.copied * copied
        else:  # of the gain of TF32: the factors are those of a transposed product
            allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
            return 1.0 if allowed else rates.tf32_gain
        return cost * PRODUCT_PS[dtype] * TOKENS * 1e-6

    return clock
