"""Telling how far a measurement is."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator

Report = Callable[[int, int], None]


@contextlib.contextmanager
def reporting(progress: bool | Report, total: int) -> Iterator[Report]:
    """A function to call with (samples done, samples in all).

    Args:
        progress: such a function itself; or True for a bar, drawn where rich is installed and
            standard error is a terminal; or False for nothing.
        total: how many samples are wanted.
    """
    if callable(progress):
        yield progress
    elif progress and sys.stderr.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("Measuring sensitivity", total=total)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield lambda done, total: None
