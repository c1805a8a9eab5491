"""Prints the contests of a bench run as one table, and pins what would make two runs differ."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import pytest
import torch

from .contest import CONTESTS


@pytest.fixture(scope="session")
def device() -> torch.device:
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not CONTESTS:
        return
    write = terminalreporter.write_line
    where = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    write("")
    write(
        f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads; alternating runs"
    )
    for contest in CONTESTS:
        write("")
        write(contest.title)
        write(f"  {'':<44}{'median':>10}{'min':>10}{'max':>10}   ours / this")
        for row in contest.rows:
            times = f"{row.median_ms:>8.2f}ms{row.min_ms:>8.2f}ms{row.max_ms:>8.2f}ms"
            write(f"  {row.name:<44}{times}   {row.ours_over_this:>6.3f}")
