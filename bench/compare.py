"""Compares two results files and fails where ours became slower beyond the noise.

`python -m bench.compare OLD NEW`. What is compared is the ratio of ours to each contestant of the
same run, which two different days, or machines, leave comparable; where there is none, nothing is.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import results

SMALLEST_NOISE = 0.05  # of a ratio of medians, even where the runs at hand agree better


@dataclass(frozen=True)
class Change:
    """One ratio in both files, and how far it may move by chance."""

    contest: str
    rival: str
    before: float
    after: float
    noise: float

    @property
    def is_regression(self) -> bool:
        """Whether ours lost more against this rival than noise explains."""
        return self.after > self.before * (1 + self.noise)


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every ratio that both files hold, worst first."""
    changes = []
    for name in old["contests"].keys() & new["contests"].keys():
        before, after = old["contests"][name], new["contests"][name]
        rivals = {row["name"]: row for row in before["rows"][1:]}
        for row in after["rows"][1:]:
            if row["name"] not in rivals:
                continue
            rival = rivals[row["name"]]
            spread = sum(map(_noise, (before["rows"][0], after["rows"][0], rival, row))) / 2
            noise = max(SMALLEST_NOISE, spread)
            ratios = rival["ours_over_this"], row["ours_over_this"]
            changes.append(Change(name, row["name"], *ratios, noise))
    return sorted(changes, key=lambda change: change.before / change.after)


def _noise(row: Mapping[str, Any]) -> float:
    return (row["max_ms"] - row["min_ms"]) / (2 * row["median_ms"])


def main() -> int:
    """Print every ratio with its change; the exit code is 1 after a regression."""
    if len(sys.argv) != 3:
        print("usage: python -m bench.compare OLD NEW, two files of bench/results", file=sys.stderr)
        return 2
    changes = compare(*(results.read(Path(path)) for path in sys.argv[1:]))
    print(f"{'ours / rival':<72}{'before':>9}{'after':>9}{'change':>9}{'noise':>8}")
    for change in changes:
        moved = change.after / change.before - 1
        label = f"{change.contest} / {change.rival}"
        figures = f"{change.before:>9.3f}{change.after:>9.3f}{moved:>+9.1%}{change.noise:>8.1%}"
        print(f"{label[:71]:<72}{figures}{'  slower' if change.is_regression else ''}")
    slower = sum(change.is_regression for change in changes)
    print(f"{len(changes)} ratios compared, {slower} beyond the noise")
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
