"""`make soak`: every check for minutes, or with `--nightly` at its full size."""

from __future__ import annotations

import argparse
import sys
import time

from . import damaged_files, fuzz, kills, switches, threads

# name -> check, how often in minutes, how often in a night
CHECKS = {
    "damaged files": (damaged_files.check, 20_000, 1_000_000),
    "kills while saving": (kills.check, 100, 1_000),
    "kills while training": (kills.check_training, 40, 1_000),
    "ops": (fuzz.check, 300, 20_000),
    "switches": (switches.check, 1_000, 10_000),
    "threads": (threads.check, 5, 200),
}


def main() -> int:
    """Run them one after another; 1 if any fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--nightly", action="store_true", help="at full size, hours")
    parser.add_argument("--only", choices=sorted(CHECKS), action="append", help="this alone")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn")
    given = parser.parse_args()
    failed = 0
    for name in given.only or CHECKS:
        check, few, many = CHECKS[name]
        began = time.monotonic()
        try:
            told = check(many if given.nightly else few, given.seed)
        except AssertionError as error:
            failed, told = 1, f"FAILED: {error}"
        print(f"{name:<20} {told} ({time.monotonic() - began:.0f} s)", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
