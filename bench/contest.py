"""Times several ways of doing one thing in turn, in one process, and reports the ratio of medians.

The machines this runs on are shared and noisy: a lone time says little, the ratio of medians of
runs that alternate says a lot.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One contestant: its median and spread in milliseconds, and the ratio, ours over it."""

    name: str
    median_ms: float
    min_ms: float
    max_ms: float
    ours_over_this: float
    target: float | None = None


@dataclass(frozen=True)
class Contest:
    """What one bench measured; `rows[0]` is ours."""

    title: str
    rows: tuple[Row, ...]
    bytes_moved: int
    flops: int


CONTESTS: list[Contest] = []  # read by conftest at the end of the run


def hold(
    benchmark: Any,
    title: str,
    contestants: dict[str, Callable[[], object]],
    *,
    rounds: int = 7,
    bytes_moved: int = 0,
    flops: int = 0,
    targets: dict[str, float] | None = None,
) -> Contest:
    """Run `contestants` in turn `rounds` times; the first is ours, which pytest-benchmark records.

    Args:
        benchmark: pytest-benchmark's fixture.
        title: what is computed, and at which size.
        contestants: name -> a call without arguments.
        rounds: counted runs of each, after one warm-up of each.
        bytes_moved: the fewest bytes that ours must move.
        flops: the floating-point operations that ours must do.
        targets: name of a contestant -> what ours over it is to be at most.
    """
    (ours, run_ours), *others = contestants.items()
    times: dict[str, list[float]] = {name: [] for name, _ in others}
    for _, run in others:
        run()

    def let_the_others_run() -> None:
        for name, run in others:
            times[name].append(_seconds(run))

    def timed() -> None:
        run_ours()
        _wait()

    benchmark.group = title
    benchmark.pedantic(timed, setup=let_the_others_run, rounds=rounds, warmup_rounds=1)
    times = {name: seconds[1:] for name, seconds in times.items()}  # the warm-up's setup ran too
    mine = statistics.median(benchmark.stats.stats.data)
    rows = [_row(ours, benchmark.stats.stats.data, mine)]
    rows += [
        _row(name, seconds, mine, (targets or {}).get(name)) for name, seconds in times.items()
    ]
    contest = Contest(title, tuple(rows), bytes_moved, flops)
    benchmark.extra_info.update(
        bytes=bytes_moved, flops=flops, **{f"over {r.name}": r.ours_over_this for r in rows[1:]}
    )
    CONTESTS.append(contest)
    return contest


def _row(name: str, seconds: list[float], mine: float, target: float | None = None) -> Row:
    median = statistics.median(seconds)
    low, high = min(seconds) * 1e3, max(seconds) * 1e3
    return Row(name, median * 1e3, low, high, mine / median, target)


def _seconds(run: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
