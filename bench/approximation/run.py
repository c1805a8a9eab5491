"""`python -m bench.approximation.run accuracy | gradients | memory | report`: measure, or tell."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.evidence.run import WORK
from bench.evidence.setting import VIT
from bench.evidence.tasks import data_folder

from . import accuracy, gradients, memory, report
from .ways import RESULTS


def main() -> int:
    """Measure one thing, or write the page from what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("accuracy", "gradients", "memory", "report"))
    parser.add_argument("--data", type=Path, default=data_folder(), help="archives and weights")
    parser.add_argument("--work", type=Path, default=WORK, help="tasks and unfinished runs")
    parser.add_argument("--seed", type=int, action="append", help="accuracy: of these alone")
    parser.add_argument("--check", action="store_true", help="report: only whether it is as it was")
    given = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if given.what == "accuracy":
        accuracy.run_missing(given.data, given.work, given.seed or VIT.seeds)
    elif given.what == "gradients":
        gradients.measure(given.data, given.work)
    elif given.what == "memory":
        memory.account()
    else:
        return report.write(only_check=given.check)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
