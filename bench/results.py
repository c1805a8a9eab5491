"""Keeps what benches measured as JSON, one file per machine and version.

A run replaces the contests that it held and leaves the others, each with its own date and commit.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spt_kernels.costs.machine import Machine

from .contest import Contest
from .machine import Speed, commit

FOLDER = Path(__file__).parent / "results"


def write(folder: Path, machine: Machine, speed: Speed, contests: Sequence[Contest]) -> Path:
    """Add `contests` to the machine's file and return its path."""
    path = folder / machine.file_name()
    results = read(path) if path.exists() else {"contests": {}}
    results["machine"] = asdict(machine)
    results["speed"] = asdict(speed)
    when = {"date": datetime.date.today().isoformat(), "commit": commit()}
    for contest in contests:
        name = f"{contest.bench}: {contest.title}"
        if contest.axis:  # one size may be a point of two drawings
            name = f"{name}, {contest.axis}"
        results["contests"][name] = asdict(contest) | when
    results["contests"] = dict(sorted(results["contests"].items()))
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return path


def read(path: Path) -> dict[str, Any]:
    """The results of one machine and version."""
    results: dict[str, Any] = json.loads(path.read_text())
    return results
