"""Times calls in turn on one batch, by the card's own clock where there is a card."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .row import Spread
from .setting import CostSetting


def in_turn(runs: list[Callable[[], object]], setting: CostSetting) -> list[Spread]:
    """Each run once to warm up, then a number of rounds in turn, so that noise meets them alike."""
    times: list[list[float]] = [[] for _ in runs]
    for counted in [False] + [True] * setting.rounds:
        for run, seen in zip(runs, times, strict=True):
            elapsed = _elapsed_ms(run, setting)
            if counted:
                seen.append(elapsed)
    return [Spread.of(seen) for seen in times]


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
