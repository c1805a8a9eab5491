"""Keeps the contests of a bench run in the machine's results file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from spt_kernels.costs import results
from spt_kernels.costs.machine import Machine

from .contest import Contest
from .machine import Speed

FOLDER = Path(__file__).parent / "results"


def write(folder: Path, machine: Machine, speed: Speed, contests: Sequence[Contest]) -> Path:
    """Add `contests` to the machine's file and return its path."""
    entries = {}
    for contest in contests:
        name = f"{contest.bench}: {contest.title}"
        if contest.axis:  # one size may be a point of two drawings
            name = f"{name}, {contest.axis}"
        entries[name] = asdict(contest)
    return results.add(folder, machine, "contests", entries, {"speed": asdict(speed)})
