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
    if _may_lack_signs(sys.stdout):
        # a result is not lost to a sign that the terminal or the file has not
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.exit(run())


def _may_lack_signs(stream: object) -> bool:
    """Whether what cannot be encoded is an error there; bytes that are no UTF-8 are kept in it."""
    errors, encoding = (getattr(stream, name, None) for name in ("errors", "encoding"))
    return errors == "strict" or (errors == "surrogateescape" and encoding != "utf-8")
