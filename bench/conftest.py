"""Prints the contests of a bench run as tables, and pins what would make two runs differ."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import pytest
import torch

from spt_kernels.costs.machine import describe

from . import results
from .contest import CONTESTS, Contest, shown
from .machine import measure_speed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="folder of the results file to write or add to")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return _device()


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")  # where threads make data and time nothing
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    return torch.device("cpu")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if not CONTESTS:
        return
    machine, speed = describe(_device()), measure_speed(_device())
    write = terminalreporter.write_line
    write("")
    write(
        f"{machine.processor}, {machine.threads} threads, torch {torch.__version__}: reads "
        f"{speed.bytes_per_s / 1e9:.1f} GB/s, multiplies {speed.flops_per_s / 1e9:,.0f} GFLOP/s"
    )
    for contest in CONTESTS:
        write("")
        for line in table(contest):
            write(line)
    folder = config.getoption("--results")
    if folder is not None:
        write(f"\nwritten to {results.write(folder, machine, speed, CONTESTS)}")


def table(contest: Contest) -> list[str]:
    """Medians and spread of each contestant, in milliseconds, and the floor of ours."""
    lines = [contest.title]
    if contest.rows:
        lines.append(f"  {'':<46}{'median':>10}{'min':>10}{'max':>10}   ours/this   target")
    for row in contest.rows:
        times = f"{row.median_ms:>10.3f}{row.min_ms:>10.3f}{row.max_ms:>10.3f}"
        target = "" if row.target is None else f"{row.target:>9.3f}"
        if row.target is not None and row.ours_over_this > row.target:
            target += "  missed"
        lines.append(f"  {row.name:<46}{times}{row.ours_over_this:>12.3f}{target}")
    if contest.floor_ms:
        over = contest.rows[0].median_ms / contest.floor_ms
        lines.append(f"  {'floor of ours':<46}{contest.floor_ms:>10.3f}{'':>20}{over:>12.3f}")
    lines += [f"  {name}: {shown(value)}" for name, value in contest.facts.items()]
    return lines
