"""Holds a run of the demo against the committed one: `python -m bench.demo demo-output`.

With `--keep` the run becomes the committed one: its figures and pictures go to docs/demo, from
where `make report` takes the README's table.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from spt_kernels.files.atomic import write_atomically
from spt_kernels.finetuning.demo import DemoResult

DEMO = Path(__file__).parent.parent / "docs" / "demo"
KEPT = {
    "result.json": "result.json",
    "curves.png": "curves.png",
    "sensitivity.png": "spt-lora-0/sensitivity.png",
}
# Points of accuracy. The base model is the same everywhere, but processors and versions of torch
# add in other orders, and a hundred epochs make something of it.
TOLERANCE = 3.0


def read(path: Path) -> DemoResult:
    """What `spt-kernels demo` wrote."""
    return DemoResult.from_json(json.loads(path.read_text()))


def differences(run: DemoResult, committed: DemoResult) -> list[str]:
    """What of a run is not as committed; times are no part of it."""
    found = []
    if abs(run.base_accuracy - committed.base_accuracy) > 0.01:
        found.append(f"the base model: {run.base_accuracy:.1%}, not {committed.base_accuracy:.1%}")
    rows = {row.method: row for row in committed.rows}
    if [row.method for row in run.rows] != list(rows):
        return [*found, f"methods: {[row.method for row in run.rows]}, not {list(rows)}"]
    for row in run.rows:
        other = rows[row.method]
        if row.trained_parameters != other.trained_parameters:
            found.append(
                f"{row.method} trains {row.trained_parameters:,}, not {other.trained_parameters:,}"
            )
        if abs(row.mean - other.mean) > TOLERANCE / 100:
            found.append(f"{row.method}: accuracy {row.mean:.1%}, not {other.mean:.1%}")
    check = run.check
    if not check.has_plain_layers or {check.same_after_loading, check.same_after_merging} != {
        check.images
    }:
        found.append(f"the task file: {check}")
    return found


def main() -> int:
    """Compare, or keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="the demo's output folder")
    parser.add_argument("--keep", action="store_true", help="make it the committed one")
    given = parser.parse_args()
    if given.keep:
        for name, own in KEPT.items():
            write_atomically(DEMO / name, (given.run / own).read_bytes())
        return 0
    found = differences(read(given.run / "result.json"), read(DEMO / "result.json"))
    for line in found:
        print(f"unlike docs/demo/result.json: {line}", file=sys.stderr)
    if not found:
        print(f"accuracies as in docs/demo/result.json, within {TOLERANCE:g} points")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
