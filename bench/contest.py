"""Times several ways of doing one thing in turn, in one process, and reports the ratio of medians.

The machines this runs on are shared and noisy: a lone time says little, the ratio of medians of
runs that alternate says a lot.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .machine import measure_speed, wait


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
    """What one bench measured; `rows[0]` is ours, and none are there where it only counted.

    Attributes:
        bench: the file it is in, without `bench_`.
        floor_ms: the fewest bytes over this machine's bandwidth, or the fewest operations over its
            rate, whichever takes longer; 0 where none was stated.
        axis: what grows, where this is one point of a growth drawing.
        at: how far it has grown.
        facts: what was counted rather than timed.
    """

    bench: str
    title: str
    rows: tuple[Row, ...]
    bytes_moved: float
    flops: float
    floor_ms: float
    axis: str = ""
    at: float = 0
    facts: Mapping[str, float | str] = field(default_factory=dict)


CONTESTS: list[Contest] = []  # read by conftest at the end of the run


def hold(
    benchmark: Any,
    title: str,
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 7,
    bytes_moved: float = 0,
    flops: float = 0,
    targets: Mapping[str, float] | None = None,
    growth: tuple[str, float] | None = None,
    facts: Mapping[str, float | str] | None = None,
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
        growth: what grows and how far it has: one point of a drawing of cost against size.
        facts: what to note beside the times.
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
        wait()

    benchmark.group = title
    benchmark.pedantic(timed, setup=let_the_others_run, rounds=rounds, warmup_rounds=1)
    times = {name: seconds[1:] for name, seconds in times.items()}  # the warm-up's setup ran too
    mine = statistics.median(benchmark.stats.stats.data)
    rows = [_row(ours, benchmark.stats.stats.data, mine)]
    rows += [
        _row(name, seconds, mine, (targets or {}).get(name)) for name, seconds in times.items()
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    floor_ms = measure_speed(device).floor_ms(bytes_moved, flops)
    axis, at = growth or ("", 0)
    contest = Contest(
        _bench_of(benchmark),
        title,
        tuple(rows),
        bytes_moved,
        flops,
        floor_ms,
        axis,
        at,
        dict(facts or {}),
    )
    benchmark.extra_info.update(
        bytes=bytes_moved,
        flops=flops,
        floor_ms=floor_ms,
        **(facts or {}),
        **{f"over {r.name}": r.ours_over_this for r in rows[1:]},
    )
    CONTESTS.append(contest)
    return contest


def turn(contest: Contest, name: str, targets: Mapping[str, float] | None = None) -> Contest:
    """The same runs read for another of our ways: `name` comes first, ratios are to it."""
    mine = next(row for row in contest.rows if row.name == name)
    others = [row for row in contest.rows if row is not mine]
    rows = [replace(mine, ours_over_this=1.0, target=None)]
    for row in others:
        ratio = mine.median_ms / row.median_ms
        rows.append(replace(row, ours_over_this=ratio, target=(targets or {}).get(row.name)))
    turned = replace(contest, title=f"{contest.title}; {name}", rows=tuple(rows))
    CONTESTS.append(turned)
    return turned


def shown(fact: float | str) -> str:
    """A fact as tables print it."""
    return f"{fact:,.4g}" if isinstance(fact, float) else str(fact)


def record(benchmark: Any, title: str, facts: Mapping[str, float | str]) -> None:
    """Keep what a bench counted where there is nothing to time."""
    benchmark.extra_info.update(facts)
    CONTESTS.append(Contest(_bench_of(benchmark), title, (), 0, 0, 0, facts=dict(facts)))


def _bench_of(benchmark: Any) -> str:
    return Path(benchmark.fullname.partition("::")[0]).stem.removeprefix("bench_")


def _row(name: str, seconds: list[float], mine: float, target: float | None = None) -> Row:
    median = statistics.median(seconds)
    low, high = min(seconds) * 1e3, max(seconds) * 1e3
    return Row(name, median * 1e3, low, high, mine / median, target)


def _seconds(run: Callable[[], object]) -> float:
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start
