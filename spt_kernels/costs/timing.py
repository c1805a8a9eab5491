"""Times calls in turn on one batch, by the card's own clock where there is a card."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .row import Spread
from .setting import CostSetting


def in_turn(runs: list[Callable[[], object]], setting: CostSetting) -> list[Spread]:
    """Each run once to warm up, then a number of rounds in turn, so that noise meets them alike."""
    return [Spread.of(seen) for seen in _times_in_turn(runs, setting)]


def against(
    run: Callable[[], object], other: Callable[[], object], setting: CostSetting
) -> tuple[Spread, float]:
    """A run in turn with another one, and the median over the rounds of how much longer it took.

    What slows a machine down for a while meets both runs of a round, but not all rounds.
    """
    ours, theirs = _times_in_turn([run, other], setting)
    ratios = [own / its for own, its in zip(ours, theirs, strict=True)]
    return Spread.of(ours), statistics.median(ratios)


def _times_in_turn(runs: Sequence[Callable[[], object]], setting: CostSetting) -> list[list[float]]:
    """Milliseconds of each run in each round."""
    times: list[list[float]] = [[] for _ in runs]
    for counted in [False] + [True] * setting.rounds:
        for run, seen in zip(runs, times, strict=True):
            elapsed = _elapsed_ms(run, setting)
            if counted:
                seen.append(elapsed)
    return times


def make_batch(shape: tuple[int, ...], batch: int, setting: CostSetting) -> tuple[Tensor, Tensor]:
    """The same noise and labels for every row."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *shape, generator=generator)
    target = torch.randint(setting.num_classes, (batch,), generator=generator)
    if setting.dtype == "bf16":
        images = images.bfloat16()
    return images.to(setting.device), target.to(setting.device)


def autocast(setting: CostSetting) -> Any:
    """The context that a forward of this setting runs in."""
    kind = torch.device(setting.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=setting.dtype == "bf16-autocast")


def _elapsed_ms(run: Callable[[], object], setting: CostSetting) -> float:
    if not setting.on_gpu:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)
