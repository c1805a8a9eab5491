"""The command line: `spt-kernels`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command that the process was called with, and exit."""
    try:
        from .app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        message = f"the command line needs {error.name}: pip install 'spt_kernels[cli]'"
        print(f"spt-kernels: {message}", file=sys.stderr)
        sys.exit(2)
    sys.exit(run())
