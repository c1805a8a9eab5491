"""The command line: `spt-kernels`."""

from __future__ import annotations

import sys

from ..errors import MissingExtra, needed


def main() -> None:
    """Run the command that the process was called with, and exit."""
    try:
        with needed("the command line"):
            from .app import run
    except KeyboardInterrupt:
        print("spt-kernels: stopped", file=sys.stderr)
        sys.exit(130)
    except MissingExtra as error:
        print(f"spt-kernels: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(run())
