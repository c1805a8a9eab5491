"""What the user sees: tables and JSON on stdout, progress and errors on stderr."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from ..finetuning.progress import Silent, duration
from .layout import Aligned, Facts, unbroken

__all__ = ["Terminal", "count", "facts", "percent", "size", "table", "unbroken"]

_WORTH_A_LINE_SECONDS = 2.0
_LINE_SECONDS = 15.0  # between two progress lines where there is no terminal to draw on


class Terminal:
    """The two streams, and whether machines or people read them.

    Attributes:
        as_json: print one JSON object on stdout, and nothing else there.
        quiet: no progress.
        debug: let an error show where it came from.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, debug: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.debug = debug
        self.out = Console(highlight=False)
        self.err = Console(stderr=True, highlight=False)

    def show(self, value: dict[str, Any], *parts: RenderableType | Facts) -> None:
        """Give the result: `value` to a machine, `parts` to a person."""
        if self.as_json:
            print(json.dumps(value))
            return
        for part in parts:
            if isinstance(part, Facts):
                self.out.print(part.text(self.out.width), soft_wrap=True)
                continue
            # text brings its own lines, and a terminal that is too narrow may break them itself
            self.out.print(part, soft_wrap=isinstance(part, str), markup=False)

    def note(self, message: str) -> None:
        """One line on stderr that comes even when `quiet`: what the result must not be without."""
        self.err.print(message, soft_wrap=True, markup=False)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Silent | Bars | Lines]:
        """A progress display on stderr, gone or complete when the block ends."""
        if self.quiet:
            yield Silent()
        elif self.err.is_terminal:
            with Bars(self.err) as bars:
                yield bars
        else:
            yield Lines(self.err)


class Bars:
    """A bar per stage with the time left, on a terminal."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description:<21}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            expand=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def start(self, stage: str, total: int) -> None:
        """Begin a bar; the one before goes if it was too quick to be worth a line."""
        if self._task is not None:
            before = self._bars.tasks[self._task]
            spent = before.elapsed or 0.0
            self._bars.update(self._task, visible=spent >= _WORTH_A_LINE_SECONDS)
        self._task = self._bars.add_task(stage, total=total, note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move it."""
        if self._task is not None:
            more: dict[str, Any] = {"note": note} if note else {}
            self._bars.update(self._task, advance=steps, **more)

    def say(self, message: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(message, markup=False)


class Lines:
    """A plain line every few seconds, for log files."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage, self._total, self._done = "", 0, 0
        self._began = self._last = 0.0

    def start(self, stage: str, total: int) -> None:
        """Begin a stage."""
        self._stage, self._total, self._done = stage, total, 0
        self._began = self._last = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count, and write a line when it is time."""
        self._done += steps
        now = time.monotonic()
        is_over = steps > 0 and self._done >= self._total
        if now - self._last < _LINE_SECONDS and not is_over:
            return
        self._last = now
        spent = now - self._began
        when = duration(spent)
        if not is_over and self._done:
            when = f"{duration(spent / self._done * (self._total - self._done))} left"
        parts = [f"{self._stage} {self._done}/{self._total}", when, note]
        self.say(" · ".join(part for part in parts if part))

    def say(self, message: str) -> None:
        """Write a line."""
        self._console.print(message, soft_wrap=True, markup=False)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str = "",
    *,
    is_wide: bool = False,
    has_prose: bool = False,
) -> Aligned:
    """An aligned table: names in the first column, figures, flush right, in all others.

    One that `is_wide` has a single space between columns, to fit into 80. The last column of one
    that `has_prose` is broken into lines where it has to be.
    """
    return Aligned(columns, rows, title, is_wide, has_prose)


def facts(pairs: Sequence[tuple[str, str]]) -> Facts:
    """Names and values, a pair per line."""
    return Facts(pairs)


def count(number: int | None) -> str:
    """A whole number with separators."""
    return "–" if number is None else f"{number:,}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 1 as per cent."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def best_told(result: dict[str, Any], score: str, when: str) -> str:
    """The last score on validation images and, where an earlier one was better, that and its file.

    Args:
        result: of a run, with `best_file` and the scores `score` and `best_{score}`.
        score: its name.
        when: the better one was, as `epoch 3`.
    """
    last = percent(result[score])
    if result["best_file"] is None:
        return last
    return f"{last}; {percent(result[f'best_{score}'])} after {when}: {result['best_file']}"


def size(number: int | None) -> str:
    """A number of bytes in a unit that fits."""
    if number is None:
        return "–"
    for limit, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number} B"
